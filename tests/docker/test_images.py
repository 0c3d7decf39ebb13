"""The images as built from docker/Dockerfile: they build without BuildKit and run locked down (`make test-docker`)."""

from __future__ import annotations

import pytest
from docker_images import docker, in_container, packages

from diffdefend_core import __version__

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(params=["cpu", "gpu"])
def built(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_image"))


def test_they_run_locked_down_as_a_numeric_user(built: str) -> None:
    told = "id -u; grep CapEff /proc/self/status; touch /x 2>/dev/null || echo read-only; touch /tmp/x"
    run = in_container(built, "sh", "-c", told)
    assert (run.returncode, run.stdout) == (0, "10001\nCapEff:\t0000000000000000\nread-only\n"), run.stderr
    assert docker("image", "inspect", "-f", "{{.Config.User}}", built).stdout == "10001:10001\n"


def test_they_run_as_any_other_user_too(built: str) -> None:
    run = docker("run", "--rm", "--user=12345:12345", "--read-only", "--network=none", "--tmpfs=/tmp", built,
                 "python3", "-m", "diffdefend_core", "--version")  # fmt: skip
    assert run.returncode == 0 and __version__ in run.stdout, run.stderr


def test_they_hold_the_command_labels_and_an_init(built: str) -> None:
    run = in_container(built, "diffdefend", "--version")
    assert run.returncode == 0 and __version__ in run.stdout, run.stderr
    labels = docker("image", "inspect", "-f", "{{json .Config.Labels}}", built).stdout
    assert '"org.opencontainers.image.licenses":"Apache-2.0"' in labels
    assert docker("image", "inspect", "-f", "{{json .Config.Entrypoint}}", built).stdout == '["tini","--"]\n'


def test_each_holds_what_its_stages_need_and_no_more(cpu_image: str, gpu_image: str) -> None:
    cpu, gpu = packages(cpu_image), packages(gpu_image)
    assert {"mlflow", "kfp", "minio"} <= cpu and "torch" not in cpu
    assert {"torch", "diffusers", "minio"} <= gpu and not {"mlflow", "kfp"} & gpu
