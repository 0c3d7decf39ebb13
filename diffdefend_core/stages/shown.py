"""What people see of a run: outcome, report, measured values, and one row of the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Scorecard, Verdict
from diffdefend_core.errors import InputError
from diffdefend_core.io import folders
from diffdefend_core.report.table import SummaryRow
from diffdefend_core.stages.folder import read_record


def outcome(gate_uri: str) -> str:
    """Return the outcome's closed word. Raises ArtifactError."""
    return read_record(GateDecision, gate_uri, "gate_decision").outcome.value


def report(gate_uri: str) -> str:
    """Return the HTML report. Raises ArtifactError."""
    return folders.read_file(gate_uri, "report.html").decode("utf-8")


def metrics(scorecard_uri: str) -> dict[str, float]:
    """Return the measured values as `<metric>_<before|after>`. Raises ArtifactError."""
    scorecard = read_record(Scorecard, scorecard_uri, "scorecard")
    sides = {"before": scorecard.before, "after": scorecard.after or {}}
    return {f"{name}_{side}": metric.value for side, values in sides.items() for name, metric in values.items()}


def summary(gate_uri: str, scorecard_uri: str, candidate_uri: str) -> SummaryRow:
    """Return the row of a run in the summary table. Raises ArtifactError."""
    candidate = read_record(Candidate, candidate_uri, "candidate")
    return SummaryRow.from_records(
        read_record(ModelRef, candidate.model_uri, "model_ref"),
        read_record(Verdict, candidate.verdict_uri, "verdict"),
        read_record(Scorecard, scorecard_uri, "scorecard"),
        read_record(GateDecision, gate_uri, "gate_decision"),
    )


def executor_output(executor_input: str, metrics: dict[str, float]) -> tuple[Path, str]:
    """Return path and content of the file in which a KFP container states its artifacts.

    Without it the run page knows neither the metrics' values nor, in local runs, that there are artifacts at all.
    """
    try:
        outputs: dict[str, Any] = json.loads(executor_input)["outputs"]
        named = outputs["artifacts"]
        stated = {name: {"artifacts": [dict(item["artifacts"][0])]} for name, item in named.items()}
        path = Path(outputs["outputFile"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"--executor-input is {executor_input[:40]!r}",
            expected="the executor input of a KFP step",
            action="leave it out outside of KFP",
        ) from error
    if "metrics" in stated:
        stated["metrics"]["artifacts"][0]["metadata"] = metrics
    return path, json.dumps({"artifacts": stated})
