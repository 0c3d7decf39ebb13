"""The smoke checks: what they say and how they exit, against a KFP server of our own and a kubectl that is a script."""

import os
from pathlib import Path

import kfp
import pytest
from kfp_server import kfp_server

from diffdefend_core.cli import run_command
from pipelines.smoke import CheckFailedError, SkippedError, kubectl, main, report

REFUSING = '#!/bin/sh\necho "Unable to connect to the server" >&2\nexit 1\n'


def _fail() -> str:
    raise CheckFailedError("a", expected="b", action="c")


def _skip() -> str:
    raise SkippedError("a", expected="b", action="c")


def test_a_failed_promise_is_1_and_a_skipped_one_is_never_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert report({"x": lambda: "fine", "y": _skip}) == 0
    assert report({"x": _fail, "y": lambda: "fine"}) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "skip", "FAIL", "ok"]


def test_without_a_cluster_every_check_of_it_fails_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kubectl").write_text(REFUSING)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))
    with kfp_server() as server:
        assert main(["--host", server.url]) == 1
    words = {line[6:].split(":")[0]: line[:5].strip() for line in capsys.readouterr().out.splitlines()}
    assert len(words) == 10
    assert {name for name, word in words.items() if word == "ok"} == {
        "the KFP server answers", "a schedule is created, shown and removed",
    }  # fmt: skip
    assert {name for name, word in words.items() if word == "skip"} == {
        "an accelerator is there", "a run of the gate ends well",
    }  # fmt: skip
    assert server.recurring == [] and server.runs == []


def test_what_kubectl_says_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text(REFUSING)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CheckFailedError, match="Unable to connect"):
        kubectl("get", "nodes")


def test_a_wrong_host_is_2() -> None:
    assert main(["--host", "nowhere"]) == 2
    assert run_command(["submit", "models:/m/1", "--host", "nowhere"]) == 2
