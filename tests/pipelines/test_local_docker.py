"""`run --docker`: the compiled gate in real containers of a tiny stand-in image."""

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.containers import give

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
IMAGE = "diffdefend-stand-in:test"
RUN = """
import json, signal, sys
from diffdefend_core.config import load_settings
from pipelines.local import run_gate
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
folder = sys.argv[1]
registry = f"sqlite:///{folder}/registry/mlflow.db"
settings = load_settings(store=f"file://{folder}/store", tracking_uri=registry, device="cpu")
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
        for name in ("sh", "mkdir", "dirname", "sleep"):
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


def _start(folder: Path, image: str = IMAGE, network: str = "none", mark: str = "") -> subprocess.Popen[str]:
    (folder / "model").mkdir(exist_ok=True)
    if mark:
        give(folder / "store")
        (folder / "store" / mark).touch()
    environment = {**os.environ, "DIFFDEFEND_IMAGE": image, "DIFFDEFEND_DOCKER_NETWORK": network}
    command, pipe = [sys.executable, "-c", RUN, str(folder)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _run(folder: Path, **given: str) -> tuple[int, str, list[str]]:
    """Return the exit code, stdout, and the lines of stderr."""
    process = _start(folder, **given)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err.splitlines()


def _containers() -> list[object]:
    client = importlib.import_module("docker").from_env()
    return list(client.containers.list(all=True, filters={"ancestor": IMAGE}))


@pytest.mark.usefixtures("stand_in")
def test_the_gate_runs_in_containers_that_see_the_model_in_load_only(tmp_path: Path) -> None:
    code, out, lines = _run(tmp_path)
    scanned = f"{tmp_path}/model>load>invert-trigger>detect>keep"
    assert code == 0, lines
    assert f'"gate_uri": "{scanned}>register"' in out and out.count("\n") == 1
    assert lines == [
        f"log of {name} on cpu" for name in ("load", "invert-trigger", "detect", "keep", "evaluate", "register")
    ]
    assert _containers() == []


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("fails", "StageFailedError: evaluate found x; expected y; do z"),
        ("dies", "stage evaluate was killed (SIGKILL), which the kernel does when the memory is used up;"),
    ],
)
def test_a_failing_container_ends_the_run_with_its_own_line(tmp_path: Path, mark: str, said: str) -> None:
    code, _, lines = _run(tmp_path, mark=mark)
    assert code == 1 and said in lines[-1]


@pytest.mark.usefixtures("stand_in")
def test_an_interrupted_run_leaves_no_container(tmp_path: Path) -> None:
    process = _start(tmp_path, mark="hangs")
    for line in process.stderr or ():
        if line.startswith("log of evaluate"):
            break
    assert len(_containers()) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0 and _containers() == []


@pytest.mark.usefixtures("stand_in")
def test_an_absent_image_or_network_is_named_in_one_line(tmp_path: Path) -> None:
    code, out, lines = _run(tmp_path, image="diffdefend-absent:test")
    assert (code, out) == (1, "") and "there is no image diffdefend-absent:test" in lines[-1]
    code, out, lines = _run(tmp_path, network="no-such-network")
    assert (code, out) == (1, "") and "the container of stage load cannot be run" in lines[-1]
    assert "no-such-network" in lines[-1] and _containers() == []
