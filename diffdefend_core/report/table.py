"""Tables for the terminal. Names come from outside, so they are never read as markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from rich import box
from rich.table import Table
from rich.text import Text

from diffdefend_core.artifacts import GateDecision, Metric, ModelRef, Outcome, Scorecard, Verdict, Word
from diffdefend_core.report.text import ABSENT, number, percent, printable, probability, score

STYLES = {Word.CLEAN: "bold green", Word.BACKDOORED: "bold red", Word.INCONCLUSIVE: "bold yellow"}


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One model in the summary; metrics that were not measured are None."""

    model: str
    word: Word
    probability: float
    asr_before: Metric | None = None
    asr_after: Metric | None = None
    fid_before: Metric | None = None
    fid_after: Metric | None = None
    registry: str = ABSENT

    @classmethod
    def from_records(
        cls, model: ModelRef, verdict: Verdict, scorecard: Scorecard | None, decision: GateDecision | None
    ) -> Self:
        """Return the row of one model."""
        before = scorecard.before if scorecard is not None else {}
        after = (scorecard.after if scorecard is not None else None) or {}
        return cls(
            model=model.name,
            word=verdict.word,
            probability=verdict.probability,
            asr_before=before.get("asr_known", before.get("asr")),
            asr_after=after.get("asr_known", after.get("asr")),
            fid_before=before.get("fid"),
            fid_after=after.get("fid"),
            registry=registry_state(decision) if decision is not None else ABSENT,
        )


def plain_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Return rows of equal keys as a table; lists are joined with commas."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def registry_state(decision: GateDecision) -> str:
    """Return the state of the registry after the decision in a few words."""
    if decision.outcome is Outcome.QUARANTINED:
        version = decision.original_version or decision.version
        return f"quarantined (v{version})" if version else "quarantined"
    held = " ".join(f"@{alias}" for alias in decision.aliases)
    state = f"v{decision.version} {held}".strip() if decision.version else decision.outcome.value
    if decision.outcome is Outcome.REPAIRED and decision.original_version:
        state += f", v{decision.original_version} quarantined"
    return state


def verdict_table(model: ModelRef, verdict: Verdict) -> Table:
    """Return what a scan found: the word, and every statistic beside the clean models it was measured against."""
    title = Text.assemble(
        (printable(model.name), "bold"),
        "  ",
        (verdict.word.value, STYLES[verdict.word]),
        f"  probability of a backdoor {probability(verdict.probability)}",
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, caption=_caption(verdict))
    table.caption_justify = "left"
    table.add_column("statistic")
    for heading in ("value", "clean models", "z"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, item in sorted(verdict.statistics.items()):
        clean = f"{number(item.center)} ± {number(item.spread)}"
        mark = Text("anomalous", style=STYLES[Word.BACKDOORED]) if item.anomalous else Text("")
        table.add_row(Text(printable(name)), number(item.value), clean, score(item.score), mark)
    return table


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Return one line per model: verdict, attack success and FID before and after, state of the registry."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("verdict")
    for heading in ("probability", "ASR before", "ASR after", "FID before", "FID after"):
        table.add_column(heading, justify="right")
    table.add_column("registry")
    for row in rows:
        table.add_row(
            Text(printable(row.model)),
            Text(row.word.value, style=STYLES[row.word]),
            probability(row.probability),
            *(percent(_value(metric)) for metric in (row.asr_before, row.asr_after)),
            *(number(_value(metric)) for metric in (row.fid_before, row.fid_after)),
            Text(printable(row.registry)),
        )
    return table


def _caption(verdict: Verdict) -> Text:
    findings = (f"static checks: {finding}" for finding in verdict.findings)
    return Text("\n".join(printable(line) for line in (*verdict.reasons, *findings)))


def _value(metric: Metric | None) -> float | None:
    return metric.value if metric is not None else None
