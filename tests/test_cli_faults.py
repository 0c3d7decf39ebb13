"""What a command says and leaves when it is ended, when the disk is full, and when the memory is used up."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdefend_core.cli import group
from diffdefend_core.cli.exit_codes import EXIT_TERMINATED
from diffdefend_core.cli.failures import SECRETS, explained, redacted

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "DIFFDEFEND_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        server.settimeout(120)
        yield server


def test_sigterm_ends_a_stage_with_one_line_and_leaves_no_temporary_folder(
    environment: dict[str, str], silent_server: socket.socket, tmp_path: Path
) -> None:
    environment |= {"DIFFDEFEND_S3_ENDPOINT": f"http://127.0.0.1:{silent_server.getsockname()[1]}"}
    environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b" * 8}
    command = [sys.executable, "-m", "diffdefend_core", "load", "--source", "s3://bucket/model/"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    with process, silent_server.accept()[0]:
        assert [path.name[:10] for path in (tmp_path / "tmp").iterdir()] == ["diffdefend"]
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_TERMINATED == 128 + signal.SIGTERM
    assert error == "diffdefend: error: terminated (SIGTERM); finished stages are kept, run it again to go on\n"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / ".diffdefend").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    environment: dict[str, str], model_folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same place."""
    command = [sys.executable, "-m", "diffdefend_core", "load", "--source", str(model_folder)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, preexec_fn=_small_files
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("diffdefend: error: ")
    assert "disk is full" in done.stderr or "free space" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not list((tmp_path / ".diffdefend").rglob("manifest.json"))


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "the disk is full (/tmp/x); expected room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full (Disk quota exceeded)"),
        (MemoryError(), "the memory is used up"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "the memory is used up"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "the memory is used up"),
        (OSError(errno.EACCES, "Permission denied"), "unexpected PermissionError"),
        (RuntimeError("shape mismatch"), "unexpected RuntimeError: shape mismatch"),
    ],
)
def test_each_fault_has_its_own_line(error: Exception, said: str) -> None:
    assert explained(error).startswith(said)


def test_memory_that_is_used_up_ends_a_command_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("diffdefend_core.stages.load.load", exhaust)
    assert group.run_command(["load", "--source", str(model_folder)]) == 2
    assert "the memory is used up; expected room" in capsys.readouterr().err


def test_no_secret_of_the_environment_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"canary-{number}")
    text = redacted("at https://user:word@host/x: " + " ".join(f"canary-{number}" for number in range(len(SECRETS))))
    assert "canary" not in text and "word" not in text and "https://***@host/x" in text
