"""The images of docker/Dockerfile, built once for the tests that need a docker daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = os.environ.get("DIFFDEFEND_TEST_BASE", "python:3.11-slim")
TORCH_INDEX = os.environ.get("DIFFDEFEND_TEST_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
NAME = "diffdefend-test"
LOCKED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none", "--tmpfs=/tmp")
NO_DAEMON = "no docker daemon answers (start one, or name it with DOCKER_HOST)"
NO_BASE = f"the base image {BASE} is not there and cannot be pulled (DIFFDEFEND_TEST_BASE names another)"


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the docker client."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, env=environment, check=False)


def in_container(image: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a container that has no rights and no network."""
    return docker("run", "--rm", *LOCKED, image, *command)


def why_not() -> str:
    """Return why no image can be built here, nothing if one can."""
    if shutil.which("docker") is None or docker("version").returncode:
        return NO_DAEMON
    if docker("image", "inspect", BASE).returncode and docker("pull", BASE).returncode:
        return NO_BASE
    return ""


def build(target: str) -> str:
    """Build a target of the Dockerfile and return the image's name. Fails with the end of the build's log."""
    tag, arguments = f"{NAME}:{target}", {"BASE": BASE}
    if target == "gpu":
        arguments["TORCH_INDEX"] = TORCH_INDEX
    if os.environ.get("PIP_INDEX_URL"):
        arguments["PIP_INDEX_URL"] = os.environ["PIP_INDEX_URL"]
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    run = docker("build", "--network=host", *given, "--target", target, "-t", tag,
                 "-f", str(ROOT / "docker" / "Dockerfile"), str(ROOT))  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return tag


def packages(image: str) -> set[str]:
    """Return the names of the Python packages in an image."""
    listed = in_container(image, "cat", "/opt/diffdefend/packages.txt").stdout
    return {line.partition("==")[0].lower() for line in listed.splitlines()}
