"""Runs of the gate on Kubeflow Pipelines, for scans of a registry: one KFP run for each version.

The compiled gate is uploaded once, as a version that its digest names. A run has a name that follows from the version
and the settings: one of that name that is under way is taken over, so that a restarted scan starts none twice.
Credentials come from the environment: `DIFFDEFEND_KFP_TOKEN`, else as the kfp client finds them in a pod.
"""

import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path

import kfp_server_api
import urllib3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kfp

from diffdefend_core.config import Settings, without_password
from diffdefend_core.errors import InputError, RegistryError
from diffdefend_core.provenance import digest_of
from diffdefend_core.stages.dispatch import Job
from pipelines.compile import compile_gate

UNDER_WAY = ("PENDING", "RUNNING", "PAUSED", "CANCELING", "RUNTIME_STATE_UNSPECIFIED", "None")
_PAGE = 100


class KfpRuns:
    """Runs on the server at `host`. A `Runner` of `stages.dispatch`; every call raises RegistryError.

    `namespace` is needed by a server with many users only; `service_account` is that of the pods. Raises InputError at
    a store that pods do not see.
    """

    kind = "kfp"

    def __init__(
        self, settings: Settings, host: str, *, gpu: bool = False, namespace: str = "", service_account: str = "",
        interval: float = 5.0,
    ) -> None:  # fmt: skip
        if not host.startswith(("http://", "https://")) or "@" in host:
            raise InputError(
                f"--kfp {without_password(host)!r}", expected="http(s)://name[:port][/path], without a password",
                action="correct it",
            )  # fmt: skip
        if not settings.store.startswith("s3://"):
            raise InputError(
                f"the store is {settings.store}", expected="an s3:// URI: the pods do not see this machine",
                action="give --store s3://bucket/prefix/",
            )  # fmt: skip
        self._settings, self._host, self._gpu = settings, host, gpu
        self._namespace, self._service_account, self.interval = namespace, service_account, interval

    def begin(self, job: Job) -> str:
        """Start a run for the version, or take over the one that is under way."""
        name = self._run_name(job)
        with self._calling():
            found = self._under_way(name)
            if found is not None:
                return found
            pipeline, version = self._pipeline
            run = self._client.run_pipeline(
                experiment_id=self._experiment, job_name=name, pipeline_id=pipeline, version_id=version,
                params={
                    "source": job.uri, "settings": self._settings.science_json(), "store": self._settings.store,
                    "name": "",
                },
                service_account=self._service_account or None,
            )  # fmt: skip
            return str(run.run_id)

    def outcome(self, run: str) -> str | None:
        """Return None while the run is under way, then an empty text or the state that it ended in."""
        with self._calling():
            found = self._client.get_run(run)
        state = str(found.state)
        if state in UNDER_WAY:
            return None
        return "" if state == "SUCCEEDED" else f"the KFP run {run} ended as {state}{_why(found)}"

    def stop(self, run: str) -> None:
        """Ask the server to end the run."""
        with self._calling():
            self._client.terminate_run(run)

    def _run_name(self, job: Job) -> str:
        key = digest_of([self._settings.tracking_uri, job.name, job.version, self._settings.digest()])[:12]
        return f"gate {job.name[:80]} v{job.version} {key}"

    def _under_way(self, name: str) -> str | None:
        predicate = {"operation": 1, "key": "display_name", "stringValue": name}
        found = self._client.list_runs(
            page_size=_PAGE, sort_by="created_at desc", experiment_id=self._experiment,
            filter=json.dumps({"predicates": [predicate]}),
        )  # fmt: skip
        runs = [run for run in found.runs or [] if run.display_name == name and str(run.state) in UNDER_WAY]
        return str(runs[0].run_id) if runs else None

    @cached_property
    def _client(self) -> kfp.Client:
        token = os.environ.get("DIFFDEFEND_KFP_TOKEN") or None
        return kfp.Client(host=self._host, namespace=self._namespace or "kubeflow", existing_token=token)

    @cached_property
    def _experiment(self) -> str:
        made = self._client.create_experiment(self._settings.experiment, namespace=self._namespace or None)
        return str(made.experiment_id)

    @cached_property
    def _pipeline(self) -> tuple[str, str]:
        """Upload the gate unless it is there; return the ids of the pipeline and the version."""
        with tempfile.TemporaryDirectory(prefix="diffdefend-kfp-") as folder:
            path = Path(folder) / "gate.yaml"
            compile_gate(path, science=self._settings.science_json(), gpu=self._gpu)
            name = "diffdefend-gate-" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            pipeline = self._client.get_pipeline_id(name)
            if pipeline is None:
                made = self._client.upload_pipeline(str(path), pipeline_name=name, namespace=self._namespace or None)
                pipeline = made.pipeline_id
        versions = self._client.list_pipeline_versions(pipeline, page_size=1, sort_by="created_at desc")
        return str(pipeline), str(versions.pipeline_versions[0].pipeline_version_id)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """What kfp prints stays away from stdout; what it raises becomes one line without credentials."""
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except kfp_server_api.ApiException as error:
            raise RegistryError(
                f"{self._host} answered {error.status} {error.reason or ''}".strip(), expected="success",
                action="check the address, the token (DIFFDEFEND_KFP_TOKEN) and the log of the ml-pipeline deployment",
            ) from error  # fmt: skip
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RegistryError(
                f"no answer from {self._host} ({type(error).__name__})", expected="a Kubeflow Pipelines server",
                action="check --kfp",
            ) from error  # fmt: skip


def _why(run: kfp_server_api.V2beta1Run) -> str:
    message = getattr(run.error, "message", None) if run.error else None
    return f": {' '.join(str(message).split())[:200]}" if message else ""
