"""The corpus of hostile models: nothing runs, nothing gets through, and what is harmless stays text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sample_records as sample

from benchmarks import hostile
from benchmarks.hostile_models import CANARY, HARMLESS, KINDS, command
from diffdefend_core.artifacts import ModelRef, Word
from diffdefend_core.config import Settings
from diffdefend_core.options import GateOptions
from diffdefend_core.report.bundle import ReportBundle
from diffdefend_core.report.html import render_html
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import load

# needs the process of torch, which takes seconds to start; `make hostile` runs all
SLOW = {"storage of one number behind a tensor of a terabyte", "zip bomb: a compressed member of 1 GB"}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CANARY, str(tmp_path / "canary"))
    return tmp_path / "canary"


def test_the_payload_works_where_it_is_run(canary: Path) -> None:
    assert hostile.payload_works(canary)


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 25


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in KINDS])
def test_a_hostile_model_is_refused_or_harmless(name: str, pristine_model: Path, tmp_path: Path, canary: Path) -> None:
    row = hostile.run_kind(name, pristine_model, tmp_path)
    assert hostile.passed(row), row


def test_a_model_that_runs_its_payload_would_be_noticed(pristine_model: Path, tmp_path: Path, canary: Path) -> None:
    os.system(command())
    row = hostile.run_kind("script in the model card", pristine_model, tmp_path)
    assert row["executed"] and not hostile.passed(row)


def test_the_report_of_a_harmless_one_contains_no_script(model_folder: Path, tmp_path: Path, canary: Path) -> None:
    for name, (expected, attack) in KINDS.items():
        if expected == HARMLESS and "name of the model" not in name:
            attack(model_folder)
    name = "<script>alert(1)</script>"
    model = read_record(
        ModelRef, load(str(model_folder), settings=Settings(store=f"file://{tmp_path}/s"), name=name), "model_ref"
    )
    html = render_html(
        ReportBundle(model=model, trigger=sample.trigger(), verdict=sample.verdict(Word.CLEAN), options=GateOptions())
    )
    assert "<script" not in html and "&lt;script&gt;" in html and "{{" not in html
