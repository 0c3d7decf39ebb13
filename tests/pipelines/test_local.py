"""The compiled gate run by kfp.local itself; only the command of the stages is replaced, by a script."""

import importlib.metadata
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from kfp import local
from kfp.local import status, subprocess_task_handler

from components.keep.component import keep
from diffdefend_core.cli.failures import Terminated, raise_at_sigterm
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import InputError
from diffdefend_core.options import GateOptions, SigningOptions
from diffdefend_core.stages.keys import write_key
from pipelines.local import StageFailedError, StageHandler, StageLog, run_gate

SCRIPT = Path(__file__).with_name("stage_script.py")


class ScriptHandler(StageHandler):
    def command(self) -> list[str]:
        _, *others = super().command()
        return [sys.executable, str(SCRIPT), *others[2:]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(store=f"file://{tmp_path}/store", device="cpu")


@pytest.mark.parametrize(
    ("word", "stage"), [("clean", "keep"), ("backdoored", "purify"), ("inconclusive", "quarantine")]
)
def test_each_word_takes_its_branch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], word: str, stage: str
) -> None:
    monkeypatch.setenv("STAND_IN_WORD", word)
    result = run_gate("m", settings, handler=ScriptHandler)
    scanned = "m>load>invert-trigger>detect"
    assert result == {
        "verdict_uri": scanned,
        "candidate_uri": f"{scanned}>{stage}",
        "scorecard_uri": f"{scanned}>{stage}>evaluate",
        "gate_uri": f"{scanned}>{stage}>register",
        "word": word,
        "outcome": "promoted",
    }
    out, err = capfd.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if line] == [
        f"log of {name} on cpu" for name in ("load", "invert-trigger", "detect", stage, "evaluate", "register")
    ]


def test_quiet_says_nothing_verbose_says_what_kfp_does(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_WORD", "clean")
    run_gate("m", settings, handler=ScriptHandler, quiet=True)
    assert capfd.readouterr() == ("", "")
    run_gate("m", settings, handler=ScriptHandler, verbose=True)
    out, err = capfd.readouterr()
    assert out == "" and "Executing task" in err


def test_a_failing_stage_ends_the_run_with_its_own_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_WORD", "backdoored")
    monkeypatch.setenv("STAND_IN_FAILS", "purify")
    with pytest.raises(StageFailedError, match=r"^purify found x; expected y; do z$"):
        run_gate("m", settings, handler=ScriptHandler)
    err = capfd.readouterr().err
    assert "log of purify" in err and "evaluate" not in err and "purify found x" not in err


def test_a_stage_that_dies_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_WORD", "clean")
    monkeypatch.setenv("STAND_IN_DIES", "invert-trigger")
    with pytest.raises(StageFailedError, match="invert-trigger ended with code -6"):
        run_gate("m", settings, handler=ScriptHandler, quiet=True)


def test_a_stage_that_the_kernel_kills_is_named_with_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_WORD", "clean")
    monkeypatch.setenv("STAND_IN_KILLED", "detect")
    with pytest.raises(StageFailedError, match=r"stage detect was killed \(SIGKILL\).*run it again"):
        run_gate("m", settings, handler=ScriptHandler, quiet=True)


def test_sigterm_ends_the_stage_too(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "pid"
    monkeypatch.setenv("STAND_IN_HANGS", str(written))

    def terminate() -> None:
        while not (written.is_file() and written.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        raise_at_sigterm()
        threading.Thread(target=terminate, daemon=True).start()
        with pytest.raises(Terminated):
            run_gate("m", settings, handler=ScriptHandler, quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_only_load_and_register_get_the_credentials_of_the_registry(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_WORD", "backdoored")
    monkeypatch.setenv("STAND_IN_TELLS", "yes")
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "canary")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = settings.model_copy(update={"tracking_uri": "https://user:canary@mlflow"})
    run_gate("m", uri, handler=ScriptHandler)
    told = {line.partition(" has ")[0]: line for line in capfd.readouterr().err.splitlines() if " has " in line}
    with_secrets = {stage for stage, line in told.items() if "canary" in line}
    assert with_secrets == {"load", "register"}
    assert told.keys() == {"load", "invert-trigger", "detect", "purify", "evaluate", "register"}
    assert 'DIFFDEFEND_TRACKING_URI": "https://mlflow"' in told["detect"]


def test_paths_with_python3_in_them_arrive_unchanged(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """kfp.local itself replaces `python3` in every argument."""
    monkeypatch.setenv("STAND_IN_WORD", "clean")
    assert run_gate("s3://m/python3/x", settings, handler=ScriptHandler)["gate_uri"].startswith("s3://m/python3/x>")


def test_the_handler_is_put_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess_task_handler.SubprocessTaskHandler
    monkeypatch.setenv("STAND_IN_FAILS", "load")
    with pytest.raises(StageFailedError):
        run_gate("m", settings, handler=ScriptHandler, quiet=True)
    assert subprocess_task_handler.SubprocessTaskHandler is original


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"signing": SigningOptions(key_file="gone.pem")}, "gone.pem"),
        ({"gate": GateOptions(policy="gone.yaml")}, "gone.yaml"),
    ],
)
def test_a_key_or_a_policy_that_cannot_be_used_is_told_before_the_scan(
    settings: Settings, group: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run_gate("m", settings.model_copy(update=group), handler=NeverStarted)


class NeverStarted(StageHandler):
    def run(self) -> status.Status:
        raise AssertionError("a stage was started")


def test_the_stages_are_told_where_the_key_lies_and_how_long_a_decision_holds(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    signing = SigningOptions(key_file=write_key(Path("keys"))["private_file"], valid_days=7)
    seen: list[Settings] = []

    class Reads(StageHandler):
        def run(self) -> status.Status:
            with monkeypatch.context() as step:
                step.chdir("/")
                for name, text in self.environment.items():
                    step.setenv(name, text)
                seen.append(load_settings())
            return status.Status.FAILURE

    with pytest.raises(StageFailedError):
        run_gate("m", settings.model_copy(update={"signing": signing}), quiet=True, handler=Reads)
    assert (seen[0].signing.key_file, seen[0].signing.valid_days) == (str(tmp_path / "keys/signing-key.pem"), 7)


def test_without_a_docker_daemon_there_is_one_clear_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(InputError, match="no docker daemon answers"):
        run_gate("m", settings, docker=True)


@pytest.mark.filterwarnings("ignore:You may be attemping")
def test_kfp_still_has_the_two_checks_that_are_lifted(tmp_path: Path) -> None:
    """If this fails, read kfp/local/subprocess_task_handler.py of the new version before raising the pin."""
    assert importlib.metadata.version("kfp").startswith("2.17.")
    for name in ("validate_image", "validate_not_container_component", "run"):
        assert name in vars(subprocess_task_handler.SubprocessTaskHandler)
    local.init(local.SubprocessRunner(use_venv=False), str(tmp_path / "root"), str(tmp_path / "work"))
    with pytest.raises(RuntimeError, match="Container Component"):
        keep(model_uri="m", trigger_uri="t", verdict_uri="v", settings="{}", store="")


def test_lines_are_told_apart_even_when_they_arrive_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    log = StageLog()
    for piece in ("    diffdefend: er", "ror: first\nnoise\n   diffdefend: error: last", "\nmore\n"):
        log.write(piece)
    assert log.error == "last"
    assert capsys.readouterr().err == ""
