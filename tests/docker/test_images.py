"""The image as built from docker/Dockerfile: it builds without BuildKit and runs locked down (`make test-docker`).

`DIFFDEFEND_TEST_BASE` names the base (default python:3.11-slim); any image with Python 3.11 and apt will do.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdefend_core import __version__

pytestmark = [pytest.mark.docker, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BASE = os.environ.get("DIFFDEFEND_TEST_BASE", "python:3.11-slim")
TAG = "diffdefend-test:cpu"
LOCKED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none", "--tmpfs=/tmp"]


def docker(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def built() -> Iterator[str]:
    if shutil.which("docker") is None or docker("version").returncode:
        pytest.skip("no docker daemon answers (DOCKER_HOST)")
    if docker("image", "inspect", BASE).returncode and docker("pull", BASE).returncode:
        pytest.skip(f"the base image {BASE} is not there and cannot be pulled (DIFFDEFEND_TEST_BASE names another)")
    run = docker("build", "--network=host", "--build-arg", f"BASE={BASE}", "--target", "cpu", "-t", TAG,
                 "-f", str(ROOT / "docker" / "Dockerfile"), str(ROOT))  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    yield TAG
    docker("rmi", "-f", TAG)


def test_it_runs_locked_down_as_a_numeric_user(built: str) -> None:
    run = docker(
        "run", "--rm", *LOCKED, built, "sh", "-c", "id -u; touch /x 2>/dev/null || echo read-only; touch /tmp/x"
    )
    assert (run.returncode, run.stdout) == (0, "10001\nread-only\n"), run.stderr
    assert docker("image", "inspect", "-f", "{{.Config.User}}", built).stdout == "10001:10001\n"


def test_it_holds_the_command_and_no_torch(built: str) -> None:
    run = docker("run", "--rm", *LOCKED, built, "diffdefend", "--version")
    assert run.returncode == 0 and __version__ in run.stdout, run.stderr
    packages = docker("run", "--rm", *LOCKED, built, "cat", "/opt/diffdefend/packages.txt").stdout
    assert "mlflow==" in packages and "kfp==" in packages and "\ntorch==" not in packages


def test_it_carries_labels_and_an_init(built: str) -> None:
    labels = docker("image", "inspect", "-f", "{{json .Config.Labels}}", built).stdout
    assert '"org.opencontainers.image.licenses":"Apache-2.0"' in labels
    assert docker("image", "inspect", "-f", "{{json .Config.Entrypoint}}", built).stdout == '["tini","--"]\n'
