"""The kill tests themselves, short: they find what is half-done, and the stages leave nothing that is."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_tests import Bench, Moment, Tally, Undisturbed, _anonymous, half_done, in_process, trial

ROOT = Path(__file__).parents[2]


def bench(root: Path) -> Bench:
    """A registry of one version in the tables that are read, without MLflow."""
    import sqlite3

    (root / "before" / "store").mkdir(parents=True)
    with sqlite3.connect(root / "before" / "mlflow.db") as database:
        database.execute("CREATE TABLE registered_model_aliases (name, alias, version)")
        database.execute("CREATE TABLE model_versions (name, version, current_stage)")
        database.execute("CREATE TABLE model_version_tags (name, version, key, value)")
        database.execute("INSERT INTO model_versions VALUES ('tiny', 1, 'None')")
    return Bench(root, {})


def write(found: Bench, text: str) -> None:
    import sqlite3

    with sqlite3.connect(found.place / "mlflow.db") as database:
        for line in text.split(";"):
            database.execute(line)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("INSERT INTO model_versions VALUES ('tiny', 2, 'None'); "
         "INSERT INTO registered_model_aliases VALUES ('tiny', 'champion', 2)", "no verdict"),
        ("INSERT INTO model_version_tags VALUES ('tiny', 1, 'diffdefend.outcome', 'quarantined'); "
         "INSERT INTO registered_model_aliases VALUES ('tiny', 'champion', 1)", "is quarantined"),
        ("INSERT INTO model_versions VALUES ('tiny', 2, 'None'); "
         "INSERT INTO model_version_tags VALUES ('tiny', 1, 'diffdefend.model_digest', 'a'); "
         "INSERT INTO model_version_tags VALUES ('tiny', 2, 'diffdefend.model_digest', 'a')", "2 versions"),
    ],
)  # fmt: skip
def test_what_is_half_registered_is_found(tmp_path: Path, broken: str, said: str) -> None:
    found = bench(tmp_path)
    found.reset()
    assert half_done(found) == []
    write(found, broken)
    assert sum(said in line for line in half_done(found)) == 1


def test_a_folder_that_is_not_whole_is_found(tmp_path: Path) -> None:
    found = bench(tmp_path)
    found.reset()
    folder = found.place / "store" / "load" / "k"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert [line[:30] for line in half_done(found)] == ["a finished folder is not whole"]


def test_a_process_is_killed_in_time_and_its_code_returned() -> None:
    import time

    assert in_process(lambda: None) == 0
    assert in_process(lambda: time.sleep(60), lambda: True) == -9
    assert in_process(lambda: sys.exit("wrong")) == 70


def test_a_kill_falls_into_the_stage_that_it_is_meant_for(tmp_path: Path) -> None:
    found = Bench(tmp_path, {})
    moment = Moment(found, "detect", 100.0)
    notes = tmp_path / "stages"
    assert not moment()
    notes.write_text("load 1.0\n 2.0\n")
    assert not moment()
    notes.write_text("load 1.0\n 2.0\ndetect 3.0\n")
    assert moment()  # long ago, by the clock
    notes.write_text(f"load 1.0\n 2.0\ndetect {10**9}\n")
    assert not moment()
    notes.write_text(f"load 1.0\n 2.0\ndetect {10**9}\n {10**9}\n")
    assert moment()


def test_a_run_that_leaves_other_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(tmp_path)
    monkeypatch.setattr("benchmarks.kill_tests.run_stages", lambda *_: None)
    tally = Tally()
    expected = Undisturbed({"load/k/model_ref.json": "0"}, {"aliases": {}, "versions": {"1": {}}}, {})
    trial(found, "clean", expected, 0, random.Random(0), tally)
    assert tally.wrong == ["clean: load/k/model_ref.json differs from the undisturbed run"]
    assert _anonymous("register/abc/report.html") == "register/report.html"


@pytest.mark.slow
def test_stages_that_are_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kill_tests", "--kills", "12", "--anew"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "kills.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "different: 0" in done.stdout
