"""Fixtures that more than one part of the tests needs: a real S3 server, and a place to store things."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny networks are fastest on one thread
from tests.ceph_server import NO_CEPH, has_ceph, serving_ceph
from tests.s3_server import ACCESS_KEY, NO_RCLONE, SECRET_KEY, S3Server, rclone_program, serving

# Tiny networks gain nothing from threads, and lose a lot to them on a busy machine; processes of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with signature checks: rclone, or with DIFFDEFEND_S3_SERVER=ceph a Ceph RadosGW.

    Skips where it is not installed, unless DIFFDEFEND_REQUIRE_S3 is set.
    """
    ceph = os.environ.get("DIFFDEFEND_S3_SERVER") == "ceph"
    if not (has_ceph() if ceph else rclone_program()):
        message = NO_CEPH if ceph else NO_RCLONE
        pytest.fail(message) if os.environ.get("DIFFDEFEND_REQUIRE_S3") else pytest.skip(message)
    with (serving_ceph if ceph else serving)(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The environment of a user of `s3_server`."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return s3_server


@pytest.fixture
def place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and neither a signing key nor a run of MLflow in the environment."""
    from diffdefend_core.stages.attestation import KEY_VARIABLE

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty store, once as a directory and once as a bucket of a real S3 server."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    server: S3Server = request.getfixturevalue("s3_environment")
    return f"s3://{server.bucket()}/store"


@pytest.fixture(scope="session")
def pristine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as diffusers wrote it; nobody changes it."""
    from tiny_models import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture
def model_folder(pristine_model: Path, tmp_path: Path) -> Path:
    """A copy of the model folder for a test to change."""
    return Path(shutil.copytree(pristine_model, tmp_path / "tiny"))
