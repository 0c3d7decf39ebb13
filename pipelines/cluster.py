"""Runs and schedules on a Kubeflow Pipelines server.

Credentials come from the environment and are never shown: `DIFFDEFEND_KFP_TOKEN` (a bearer token),
`DIFFDEFEND_KFP_COOKIE` (the session of a login page), else the projected token of a pod.
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api
import urllib3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kfp

from diffdefend_core.config import Settings, without_password
from diffdefend_core.errors import DiffDefendError, InputError
from pipelines.compile import compiled
from pipelines.placement import Placement
from pipelines.scan import LONGEST

SECONDS = 20
_FIELD = re.compile(r"[0-9A-Za-z*/,?\-]+")
_DESCRIPTORS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_PAGE = 100
_UNDER_WAY = ("PENDING", "RUNNING", "PAUSED", "CANCELING", "RUNTIME_STATE_UNSPECIFIED", "None")
_POD_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"


class ClusterError(DiffDefendError, RuntimeError):
    """Raised when the Kubeflow Pipelines server cannot be reached, refuses, or does not hold what was named."""


class _Client(kfp.Client):
    """A client that asks for the server's health once: kfp's own tries for half a minute and logs tracebacks."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> kfp_server_api.V2beta1GetHealthzResponse:
        """Return the server's health."""
        return self._healthz_api.healthz_service_get_healthz(_request_timeout=SECONDS)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run that was started: its id, the model, and its page."""

    run_id: str
    source: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """A gate that the server holds: the ids of the pipeline and of its version."""

    pipeline_id: str
    version_id: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A recurring run: name, id, models, cron expression of six fields, and whether it is on."""

    name: str
    schedule_id: str
    sources: tuple[str, ...]
    cron: str
    enabled: bool


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Kubeflow Pipelines server, and where in it we work.

    `namespace` is needed by a multi-user server only; `service_account` is that of the pods, empty for the server's
    default; `ca_file` holds the certificates to trust. Every call raises ClusterError if the server does not answer or
    refuses.
    """

    host: str
    experiment: str
    namespace: str = ""
    service_account: str = ""
    ca_file: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"host {without_password(self.host)!r}", expected="http(s)://name[:port][/path]",
                action="correct --host, --kfp or DIFFDEFEND_KFP_HOST",
            )  # fmt: skip
        if parts.username or parts.password:
            raise InputError(
                "a host with a password in it", expected="credentials in the environment",
                action="set DIFFDEFEND_KFP_TOKEN or DIFFDEFEND_KFP_COOKIE",
            )  # fmt: skip

    def submit(
        self, source: str, settings: Settings, *, placement: Placement, name: str = "", require_digests: bool = False
    ) -> Submitted:
        """Start a run of the gate for the model at `source`. Raises InputError, ClusterError."""
        science = settings.science_json()
        with compiled("gate", science=science, placement=placement, require_digests=require_digests) as path:
            run = self._start(f"gate {source}"[:120], source, settings, name=name, pipeline_package_path=str(path))
        return Submitted(run_id=run, source=source, url=f"{self.host.rstrip('/')}/#/runs/details/{run}")

    def upload(self, settings: Settings, *, placement: Placement, require_digests: bool = False) -> Uploaded:
        """Upload the gate for many runs, unless it is there under the name that its digest makes."""
        with compiled(
            "gate", science=settings.science_json(), placement=placement, require_digests=require_digests
        ) as path, self._calling() as client:  # fmt: skip
            name, namespace = f"diffdefend-gate-{_sha256(path)[:16]}", self.namespace or None
            found = client.list_pipelines(page_size=1, filter=_named_exactly(name), namespace=namespace).pipelines
            made = found[0] if found else client.upload_pipeline(str(path), pipeline_name=name, namespace=namespace)
            versions = client.list_pipeline_versions(made.pipeline_id, page_size=1, sort_by="created_at desc")
            version = versions.pipeline_versions[0]
        return Uploaded(pipeline_id=str(made.pipeline_id), version_id=str(version.pipeline_version_id))

    def take_up(self, title: str, source: str, settings: Settings, *, gate: Uploaded) -> str:
        """Return the id of the run called `title` that is under way, else of a new run of an uploaded gate."""
        with self._calling() as client:
            found = client.list_runs(
                page_size=_PAGE, sort_by="created_at desc", experiment_id=self._experiment_id,
                filter=_named_exactly(title),
            )  # fmt: skip
        for run in found.runs or []:
            if run.display_name == title and str(run.state) in _UNDER_WAY:
                return str(run.run_id)
        return self._start(title, source, settings, pipeline_id=gate.pipeline_id, version_id=gate.version_id)

    def outcome(self, run_id: str) -> str | None:
        """Return None while a run is under way, an empty text once it succeeded, else how it ended."""
        with self._calling() as client:
            run = client.get_run(run_id)
        if str(run.state) in _UNDER_WAY:
            return None
        if run.state == "SUCCEEDED":
            return ""
        message = _short(getattr(run.error, "message", None) or "")
        return f"the KFP run {run_id} ended as {run.state}" + (f": {message}" if message else "")

    def stop(self, run_id: str) -> None:
        """Stop a run."""
        with self._calling() as client:
            client.terminate_run(run_id)

    def schedules(self, name: str | None = None) -> list[Schedule]:
        """Return the schedules of the experiment, by name; with `name` those of that name."""
        found, token = [], ""
        with self._calling() as client:
            while True:
                page = client.list_recurring_runs(
                    page_token=token, page_size=_PAGE, experiment_id=self._experiment_id,
                    namespace=self.namespace or None,
                )  # fmt: skip
                found += [_schedule(item) for item in page.recurring_runs or []]
                token = page.next_page_token
                if not token:
                    break
        return sorted(
            (item for item in found if name in (None, item.name)), key=lambda item: (item.name, item.schedule_id)
        )

    def create(
        self, name: str, sources: Sequence[str], cron: str, settings: Settings, *, placement: Placement,
        require_digests: bool = False,
    ) -> Schedule:  # fmt: skip
        """Create the schedule `name`: one model goes through the gate, several through the pipeline `scan`.

        At most one of its runs is active, and missed ones are not made up for. Raises InputError if the name is taken.
        """
        _check_cron(cron)
        if self.schedules(name):
            raise InputError(
                f"there is a schedule {name!r} already", expected="a new name", action="use `schedule update`"
            )
        return self._create(name, sources, cron, settings, placement, require_digests)

    def update(
        self, name: str, sources: Sequence[str], cron: str, settings: Settings, *, placement: Placement,
        require_digests: bool = False,
    ) -> Schedule:  # fmt: skip
        """Replace the schedule `name`: KFP cannot change one, so the new one is created before the old one is deleted.

        A failure in between leaves two of that name, never none; the next update or removal deletes both.
        """
        _check_cron(cron)
        old = self._named(name)
        new = self._create(name, sources, cron, settings, placement, require_digests)
        self._delete(old)
        return new

    def remove(self, name: str) -> int:
        """Delete every schedule of that name; return how many there were."""
        found = self._named(name)
        self._delete(found)
        return len(found)

    def _create(
        self, name: str, sources: Sequence[str], cron: str, settings: Settings, placement: Placement, digests: bool
    ) -> Schedule:
        if not 1 <= len(sources) <= LONGEST:
            raise InputError(
                f"{len(sources)} models", expected=f"1 to {LONGEST}",
                action="use `diffdefend scan-registry` for more: it starts a run for each",
            )  # fmt: skip
        models = [_remote(source) for source in sources]
        kind, given = ("gate", {"source": models[0], "name": ""}) if len(models) == 1 else ("scan", {"sources": models})
        with self._calling() as client, compiled(
            kind, science=settings.science_json(), placement=placement, require_digests=digests
        ) as path:  # fmt: skip
            made = client.create_recurring_run(
                experiment_id=self._experiment_id, job_name=name, cron_expression=cron, max_concurrency=1,
                no_catchup=True, pipeline_package_path=str(path), params={**_arguments(settings), **given},
                service_account=self.service_account or None,
            )  # fmt: skip
        return _schedule(made)

    def _start(self, title: str, source: str, settings: Settings, *, name: str = "", **pipeline: str) -> str:
        arguments = {**_arguments(settings), "source": _remote(source), "name": name}
        with self._calling() as client:
            run = client.run_pipeline(
                experiment_id=self._experiment_id, job_name=title, params=arguments,
                service_account=self.service_account or None, **pipeline,
            )  # fmt: skip
        return str(run.run_id)

    def _named(self, name: str) -> list[Schedule]:
        found = self.schedules(name)
        if not found:
            names = ", ".join(sorted({item.name for item in self.schedules()})) or "none"
            raise InputError(
                f"there is no schedule {name!r} in the experiment {self.experiment!r}", expected=f"one of: {names}",
                action="see `diffdefend schedule show`",
            )  # fmt: skip
        return found

    def _delete(self, schedules: Sequence[Schedule]) -> None:
        with self._calling() as client:
            for item in schedules:
                client.delete_recurring_run(item.schedule_id)

    @cached_property
    def _client(self) -> _Client:
        client = _Client(
            host=self.host, namespace=self.namespace or "kubeflow", ssl_ca_cert=self.ca_file or None, **_credentials()
        )
        if client.get_kfp_healthz().multi_user and not self.namespace:
            raise InputError(
                "the server has many users and no namespace was given", expected="the namespace of a profile",
                action="give --namespace or DIFFDEFEND_KFP_NAMESPACE",
            )  # fmt: skip
        return client

    @cached_property
    def _experiment_id(self) -> str:
        made = self._client.create_experiment(self.experiment, namespace=self.namespace or None)
        return str(made.experiment_id)

    @contextmanager
    def _calling(self) -> Iterator[_Client]:
        """Yield the client; what kfp prints stays away from stdout, what it raises becomes a ClusterError."""
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield self._client
        except kfp_server_api.ApiException as error:
            raise self._refused(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, DiffDefendError):
                raise
            raise ClusterError(
                f"no answer from {self.host}: {_short(getattr(error, 'reason', None) or error)}",
                expected="a Kubeflow Pipelines server",
                action="check the address, or `kubectl port-forward -n kubeflow svc/ml-pipeline 8888:8888`",
            ) from error

    def _refused(self, error: kfp_server_api.ApiException) -> ClusterError:
        said = f": {_message(error)}" if _message(error) else ""
        expected, action = _ADVICE.get(error.status, ("success", "see the log of the ml-pipeline deployment"))
        return ClusterError(f"{self.host} answered {error.status}{said}", expected=expected, action=action)


_ADVICE = {
    401: ("a valid login", "set DIFFDEFEND_KFP_TOKEN or DIFFDEFEND_KFP_COOKIE anew"),
    403: ("a login that may do this", "check the role of the account in the namespace"),
    404: ("an address of the KFP v2 API", "check --host; behind a gateway it often ends in /pipeline"),
}


def _credentials() -> dict[str, Any]:
    """Return how to log in, from the environment; nothing if there is nothing."""
    token, cookie = os.environ.get("DIFFDEFEND_KFP_TOKEN"), os.environ.get("DIFFDEFEND_KFP_COOKIE")
    if token:
        return {"existing_token": token}
    if cookie:
        return {"cookies": cookie}
    path = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or _POD_TOKEN
    if os.path.exists(path):
        return {"credentials": kfp.client.ServiceAccountTokenVolumeCredentials(path)}
    return {}


def _arguments(settings: Settings) -> dict[str, str]:
    """Return what every run is given; a store on this machine means nothing there, so the pods' own one is used."""
    store = settings.store if settings.store.startswith("s3://") else ""
    return {"settings": settings.science_json(), "store": store}


def _named_exactly(name: str) -> str:
    """Return a filter of KFP's list calls."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remote(source: str) -> str:
    if not source.startswith(("s3://", "models:/")):
        raise InputError(
            f"model {source!r}", expected="s3://bucket/prefix/ or models:/name/version: pods do not see this machine",
            action="upload the model or register it",
        )  # fmt: skip
    return source


def _check_cron(cron: str) -> None:
    if cron in _DESCRIPTORS or re.fullmatch(r"@every [0-9hms.]+", cron):
        return
    fields = cron.split()
    if len(fields) != 6 or not all(_FIELD.fullmatch(field) for field in fields):
        hint = f"; did you mean '0 {cron}'?" if len(fields) == 5 else ""
        raise InputError(
            f"cron expression {cron!r}", expected="six fields, seconds first: '0 0 3 * * *' is every night at three",
            action=f"write all six{hint}",
        )  # fmt: skip


def _schedule(item: Any) -> Schedule:
    given: Mapping[str, Any] = (item.runtime_config and item.runtime_config.parameters) or {}
    sources = given.get("sources") or [given.get("source", "")]
    cron = item.trigger and item.trigger.cron_schedule and item.trigger.cron_schedule.cron
    return Schedule(
        name=str(item.display_name), schedule_id=str(item.recurring_run_id), cron=str(cron or ""),
        sources=tuple(str(source) for source in sources),
        enabled="DISABLE" not in (str(item.status), str(item.mode)) and str(item.status) != "DISABLED",
    )  # fmt: skip


def _message(error: kfp_server_api.ApiException) -> str:
    """Return what the server said, without headers, which may repeat credentials."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    match = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', body)
    return _short(match[1] if match else re.sub(r"<[^>]*>", " ", body))


def _short(text: object) -> str:
    return " ".join(re.sub(r"<urllib3[^>]*>:?", "", str(text)).split())[:200]
