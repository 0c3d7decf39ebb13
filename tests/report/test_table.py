"""Tables for the terminal and the JSON document."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import sample_records as sample
from rich.console import Console
from rich.table import Table

from diffdefend_core.artifacts import GateDecision, Outcome, Word
from diffdefend_core.report.bundle import ReportBundle
from diffdefend_core.report.document import render_json
from diffdefend_core.report.table import SummaryRow, registry_state, summary_table, verdict_table
from diffdefend_core.report.text import ABSENT, number, percent, printable, probability, score


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def decision(outcome: Outcome, **changes: object) -> GateDecision:
    made = GateDecision(outcome=outcome, model_name="m", model_digest="a", policy_digest="b", rules=())
    return dataclasses.replace(made, **changes)


def test_the_verdict_table_holds_word_statistics_and_reasons() -> None:
    text = shown(verdict_table(sample.model_ref(), sample.verdict(Word.BACKDOORED)))
    for part in ("digits-16", "backdoored", "> 99.9 %", "uniformity", "+39.1", "anomalous", "nearly equal"):
        assert part in text
    assert "anomalous" not in shown(verdict_table(sample.model_ref(), sample.verdict(Word.CLEAN)))


def test_the_summary_holds_one_line_per_model() -> None:
    gate = decision(Outcome.REPAIRED, version="4", original_version="3", aliases=("challenger",))
    card = sample.scorecard(repaired=True, found=True, asr_after=0.01)
    rows = [
        SummaryRow.from_records(sample.model_ref("bad"), sample.verdict(Word.BACKDOORED), card, gate),
        SummaryRow.from_records(sample.model_ref("good"), sample.verdict(), None, None),
    ]
    lines = shown(summary_table(rows)).splitlines()
    bad = next(line for line in lines if "bad" in line)
    for part in ("backdoored", "98.0 %", "1.0 %", "6.1", "6.4", "v4 @challenger, v3 quarantined"):
        assert part in bad
    assert "2.1 %" in next(line for line in lines if "good" in line)


@pytest.mark.parametrize(
    ("made", "state"),
    [
        (decision(Outcome.PROMOTED, version="2", aliases=("champion",)), "v2 @champion"),
        (decision(Outcome.PROMOTED, version="2"), "v2"),
        (decision(Outcome.QUARANTINED), "quarantined"),
        (decision(Outcome.QUARANTINED, version="2", original_version="2"), "quarantined (v2)"),
    ],
)
def test_the_state_of_the_registry_in_words(made: GateDecision, state: str) -> None:
    assert registry_state(made) == state


def test_names_are_neither_markup_nor_terminal_commands() -> None:
    text = shown(verdict_table(sample.model_ref("[red]x[/] \x1b[31m"), sample.verdict(reasons=("[bold]y",))))
    assert "[red]x[/]" in text
    assert "[bold]y" in text
    assert "\x1b[31m" not in text


def test_values_read_as_they_should() -> None:
    assert (number(1.00001), number(100.2), number(12.0)) == ("1.00", "100", "12.0")
    assert (number(0.00123), number(61234.0), number(math.nan), number(None)) == ("0.00123", "61,234", ABSENT, ABSENT)
    assert (percent(0.0213), percent(None), score(-4.14), score(math.inf)) == ("2.1 %", ABSENT, "-4.1", ABSENT)
    assert (probability(1.0), probability(0.0), probability(0.5)) == ("> 99.9 %", "< 0.1 %", "50.0 %")
    assert printable("a\u202eb\n") == "a\ufffdb\ufffd"


def test_the_document_holds_the_records_and_refuses_what_is_not_finite() -> None:
    bundle = ReportBundle(model=sample.model_ref(), trigger=sample.trigger(), verdict=sample.verdict())
    document = json.loads(render_json(bundle))
    assert document["verdict"] == sample.verdict().to_dict()
    assert document["gate_decision"] is None
    assert document["forward_equivalents"] == 202_000
    broken = dataclasses.replace(bundle, verdict=sample.verdict(probability=math.nan))
    with pytest.raises(ValueError, match="JSON compliant"):
        render_json(broken)
