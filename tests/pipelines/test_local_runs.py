"""Each run of a scan is a process of its own; what happens to it happens to it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffdefend_core.config import Settings, load_settings
from diffdefend_core.stages.dispatch import Job
from pipelines.local_runs import COMMAND, ROOT, LocalRuns

JOB = Job(name="faces", version="1")


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, sys; request = json.loads(sys.stdin.readline()); {code}")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(store=f"file://{tmp_path}/store", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", seed=7)


def outcome(runs: LocalRuns, run: str) -> str:
    while (found := runs.outcome(run)) is None:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("assert (request['source'], request['settings']['seed']) == ('models:/faces/1', 7); print('{\"result\": 1}')", ""),  # noqa: E501
        ("print('{\"error\": \"no weights\"}'); sys.exit(2)", "no weights"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9"),
        ("sys.exit(5)", "ended with code 5"),
        ("print('[1]')", "ended with code 0"),
    ],
)  # fmt: skip
def test_the_outcome_is_what_the_process_said_or_how_it_ended(settings: Settings, code: str, said: str) -> None:
    with LocalRuns(settings, command=script(code)) as runs:
        found = outcome(runs, runs.begin(JOB))
    assert said in found and bool(said) == bool(found)


def test_closing_ends_what_is_under_way(settings: Settings) -> None:
    with LocalRuns(settings, command=script("import time; time.sleep(600)")) as runs:
        pid = int(runs.begin(JOB).split("-")[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_run_tells_its_error_and_ends_when_its_parent_is_gone(settings: Settings) -> None:
    with LocalRuns(settings) as runs:
        assert "faces" in outcome(runs, runs.begin(JOB)), "the version is not registered"
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, cwd=ROOT, text=True, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write('{"source": "models:/faces/1", "settings": {}, "quiet": true, "verbose": false}\n')
    process.stdin.close()
    assert process.wait(timeout=120) == -9
