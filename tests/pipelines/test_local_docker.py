"""`run --docker`: the compiled gate in real containers of a tiny stand-in image."""

import importlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
IMAGE = "diffdefend-stand-in:test"
RUN = """
import json, sys
from diffdefend_core.config import load_settings
from pipelines.local import run_gate
folder = sys.argv[1]
settings = load_settings(store=f"file://{folder}/store", tracking_uri=f"sqlite:///{folder}/mlflow.db", device="cpu")
print(json.dumps(run_gate(f"{folder}/model", settings, docker=True)))
"""


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    """The image: a static shell, and a script in the place of Python. Skips without docker or busybox."""
    docker = importlib.import_module("docker")
    busybox = shutil.which("busybox")
    try:
        client = docker.from_env(timeout=30)
        client.ping()
    except docker.errors.DockerException:
        pytest.skip("no docker daemon answers")
    if busybox is None or b"/ld-linux" in Path(busybox).read_bytes():
        pytest.skip("no static busybox (apt-get install busybox-static)")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(os.path.realpath(busybox), "bin/busybox")
        archive.add(Path(__file__).with_name("stage_script.sh"), "bin/python3", filter=_executable)
        for name in ("sh", "mkdir", "dirname"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    name, _, tag = IMAGE.partition(":")
    client.api.import_image_from_data(content.getvalue(), repository=name, tag=tag)
    yield
    client.images.remove(IMAGE, force=True)


def _executable(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mode = 0o755
    return info


def _run(folder: Path, image: str) -> subprocess.CompletedProcess[str]:
    (folder / "model").mkdir(exist_ok=True)
    environment = {**os.environ, "DIFFDEFEND_IMAGE": image, "DIFFDEFEND_DOCKER_NETWORK": "none"}
    command = [sys.executable, "-c", RUN, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("stand_in")
def test_the_gate_runs_in_containers(tmp_path: Path) -> None:
    run = _run(tmp_path, IMAGE)
    scanned = f"{tmp_path}/model>load>invert-trigger>detect>keep"
    assert run.returncode == 0, run.stderr
    assert f'"gate_uri": "{scanned}>register"' in run.stdout and run.stdout.count("\n") == 1
    assert run.stderr.splitlines() == [
        f"log of {name} on cpu" for name in ("load", "invert-trigger", "detect", "keep", "evaluate", "register")
    ]


@pytest.mark.usefixtures("stand_in")
def test_a_failing_container_ends_the_run_with_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "fails").touch()
    run = _run(tmp_path, IMAGE)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith("StageFailedError: evaluate found x; expected y; do z")


@pytest.mark.usefixtures("stand_in")
def test_an_absent_image_is_named_before_anything_runs(tmp_path: Path) -> None:
    run = _run(tmp_path, "diffdefend-absent:test")
    assert run.returncode == 1 and run.stdout == ""
    assert "there is no image diffdefend-absent:test" in run.stderr.splitlines()[-1]
