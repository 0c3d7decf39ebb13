"""MLflow runs: one run per gate decision, with parameters, metrics and the evidence as artifacts.

Nothing here touches MLflow's global state: no active run, no global tracking URI. MLflow is imported inside functions,
because importing it takes seconds. A server that does not answer is given up after a bounded time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from diffdefend_core.errors import MissingExtraError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "diffdefend.gate_key"

# MLflow reads these at each call. A value that the user has set stays.
_DEFAULTS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_LONGEST_VALUE = 5000


def connect(tracking_uri: str) -> MlflowClient:
    """Return a client for tracking and registry at `tracking_uri`; a sqlite database is made if it is not there.

    Raises MissingExtraError without MLflow, RegistryError if the database cannot be opened.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise MissingExtraError(
            "MLflow is not installed", expected="the registry extra", action="pip install 'diffdefend[registry]'"
        ) from error
    with translated(tracking_uri):
        database = _database(tracking_uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextlib.contextmanager
def translated(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow raises inside into a RegistryError of one line, without credentials."""
    try:
        yield
    except _foreign_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RegistryError(
            f"the registry {without_credentials(tracking_uri)} answered: {without_credentials(reason)[:300]}",
            expected="a registry that can be reached and holds what was named",
            action="check the tracking URI, the name and the permissions",
        ) from error


def without_credentials(text: str) -> str:
    """Return the text with `user:password@` of every URL blotted out."""
    return _CREDENTIALS.sub("//***@", text)


@contextlib.contextmanager
def open_run(tracking_uri: str, experiment: str, *, key: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Open the run of the decision `key` and yield its id; it ends FINISHED, or FAILED if the body raises.

    An existing MLFLOW_RUN_ID is honoured, unless MLFLOW_TRACKING_URI says that it is a run of another server: that run
    is used, and ending it stays with whoever began it (Kubeflow's MLflow plug-in gives one to each task). Else the run
    of an earlier try with the same `key` is taken up again, so that a retry leaves one run. Raises RegistryError.
    """
    client = connect(tracking_uri)
    foreign = _run_of_others(tracking_uri)
    with translated(tracking_uri):
        run_id = (
            client.get_run(foreign).info.run_id if foreign else _own_run(client, tracking_uri, experiment, key, name)
        )
        for tag, text in tags.items():
            client.set_tag(run_id, tag, text)
    if foreign:
        yield run_id
        return
    status = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        with translated(tracking_uri):
            client.set_terminated(run_id, status)


def _run_of_others(tracking_uri: str) -> str | None:
    """Return the run that the environment hands over, None if there is none or it is one of another server."""
    theirs = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri
    return os.environ.get("MLFLOW_RUN_ID") if theirs.rstrip("/") == tracking_uri.rstrip("/") else None


def log(
    tracking_uri: str,
    run_id: str,
    *,
    params: Mapping[str, object],
    metrics: Mapping[str, float],
    files: Mapping[str, bytes],
) -> None:
    """Log into the run: parameters, the finite ones of the metrics, and files by their relative path.

    Raises RegistryError if the run holds one of the parameters with another value.
    """
    from mlflow.entities import Metric, Param

    client = connect(tracking_uri)
    now = int(time.time() * 1000)
    finite = [Metric(name, float(value), now, 0) for name, value in metrics.items() if math.isfinite(value)]
    given = {name: str(value)[:_LONGEST_VALUE] for name, value in params.items()}
    with translated(tracking_uri):
        held = client.get_run(run_id).data.params
        _refuse_conflict(run_id, held, given)
        fresh = [Param(name, value) for name, value in given.items() if name not in held]
        client.log_batch(run_id, metrics=finite, params=fresh)
        _log_files(client, run_id, files)


def _log_files(client: MlflowClient, run_id: str, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="diffdefend-mlflow-") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        client.log_artifacts(run_id, folder)


def _refuse_conflict(run_id: str, held: Mapping[str, str], given: Mapping[str, str]) -> None:
    for name, value in given.items():
        if held.get(name, value) != value:
            raise RegistryError(
                f"run {run_id} holds {name} = {held[name][:80]!r} and should be given {value[:80]!r}",
                expected="a run of its own for each gate decision",
                action="unset MLFLOW_RUN_ID or start a new run",
            )


def _own_run(client: MlflowClient, tracking_uri: str, experiment: str, key: str, name: str) -> str:
    experiment_id = _experiment_id(client, tracking_uri, experiment)
    earlier = client.search_runs([experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if earlier:
        return str(earlier[0].info.run_id)
    return str(client.create_run(experiment_id, tags={KEY_TAG: key}, run_name=name).info.run_id)


def _experiment_id(client: MlflowClient, tracking_uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(tracking_uri, name)))
        except MlflowException:
            # Another process made it in between: then it is there now, and anything else is still an error.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise RegistryError(
            f"the experiment {name!r} is {found.lifecycle_stage}",
            expected="an active experiment",
            action="restore it or set another one (DIFFDEFEND_EXPERIMENT)",
        )
    return str(found.experiment_id)


def _artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """Return where the experiment's files go: beside a sqlite database, else where the server says."""
    database = _database(tracking_uri)
    if database is None:
        return None
    return (database.parent / "mlflow-artifacts" / quote(experiment, safe="")).as_uri()


def _database(tracking_uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)).absolute() if tracking_uri.startswith(prefix) else None


def _foreign_errors() -> tuple[type[BaseException], ...]:
    from mlflow.exceptions import MlflowException

    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:  # the slim MLflow client comes without a database layer
        return (MlflowException, OSError)
    return (MlflowException, SQLAlchemyError, OSError)
