"""Runs of the gate on Kubeflow Pipelines, for scans of a registry: one KFP run for each version.

A run has a name that follows from the version and the settings: one of that name that is under way is taken over, so
that a restarted scan, or a webhook beside it, starts none twice.
"""

from functools import cached_property

from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError
from diffdefend_core.provenance import digest_of
from diffdefend_core.stages.dispatch import Job
from pipelines.cluster import Cluster, Uploaded
from pipelines.placement import Placement


class KfpRuns:
    """Runs on a cluster, which outlive this process. A `Runner` of `stages.dispatch`; calls raise ClusterError.

    Raises InputError at a store that pods do not see.
    """

    kind, lasting = "kfp", True

    def __init__(
        self, cluster: Cluster, settings: Settings, *, placement: Placement, require_digests: bool = False,
        interval: float = 5.0,
    ) -> None:  # fmt: skip
        if not settings.store.startswith("s3://"):
            raise InputError(
                f"the store is {settings.store}", expected="an s3:// URI: the pods do not see this machine",
                action="give --store s3://bucket/prefix/",
            )  # fmt: skip
        self._cluster, self._settings, self.interval = cluster, settings, interval
        self._placement, self._require_digests = placement, require_digests

    def prepare(self) -> None:
        """Upload the gate, so that what cannot work shows before the first version. Raises InputError, ClusterError."""
        self._gate  # noqa: B018 (a cached property)

    def begin(self, job: Job) -> str:
        """Start a run for the version, or take over the one that is under way."""
        key = digest_of([self._settings.tracking_uri, job.name, job.version, self._settings.digest()])[:12]
        title = f"gate {job.name[:80]} v{job.version} {key}"
        return self._cluster.take_up(title, job.uri, self._settings, gate=self._gate)

    def outcome(self, run: str) -> str | None:
        """Return None while the run is under way, then an empty text or the state that it ended in."""
        return self._cluster.outcome(run)

    def stop(self, run: str) -> None:
        """Ask the server to end the run."""
        self._cluster.stop(run)

    @cached_property
    def _gate(self) -> Uploaded:
        return self._cluster.upload(self._settings, placement=self._placement, require_digests=self._require_digests)
