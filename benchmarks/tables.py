"""The comparison of methods as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

FIRES = {True: "yes", False: "no, not scored", None: ""}


def methods_table(methods: Mapping[str, Row]) -> str:
    """Return one line for each method: how well it tells the models apart, and what it costs.

    In brackets are intervals of 95 %. What a method has not measured is empty.
    """
    return _table(
        ("method", "AUC", "other families", "cross-entropy", "TPR", "TNR", "inconclusive", "TPR at 0 % FPR",
         "TPR at 5 % FPR", "same word", "cosine", "relative L2", "evaluations", "seconds", "peak MB"),
        [
            (
                name,
                _with_interval(row, "auc"),
                _number(row.get("other_families", {}).get("auc")),
                _number(row.get("cross_entropy")),
                *(_with_interval(row, rate) for rate in ("tpr", "tnr")),
                _number(row.get("inconclusive")),
                *(_with_interval(row, rate) for rate in ("tpr_at_fpr_0", "tpr_at_fpr_5")),
                _number(row.get("repeats")),
                _number(row["median_cosine"]),
                _number(row["median_relative_l2"]),
                _number(row["median_forward_equivalents"], 0),
                _number(row["median_seconds"], 1),
                _number(row["peak_mb"], 0),
            )
            for name, row in methods.items()
        ],
    )  # fmt: skip


def models_table(rows: Sequence[Row]) -> str:
    """Return one line for each model and seed of one method."""
    return _table(
        ("model", "family", "attack", "fires", "seed", "verdict", "probability", "score", "other families", "cosine",
         "relative L2", "evaluations", "seconds"),
        [
            (
                row["model"],
                row["family"],
                row["attack"] or "",
                FIRES[row["fires"]],
                str(row["seed"]),
                row.get("verdict", ""),
                _number(row.get("probability"), 3),
                _number(row.get("score"), 1),
                row.get("other_families", {}).get("verdict", ""),
                _number(row.get("cosine")),
                _number(row.get("relative_l2")),
                _number(row["forward_equivalents"], 0),
                _number(row["seconds"], 1),
            )
            for row in rows
        ],
    )  # fmt: skip


def other_data_table(rows: Sequence[Row]) -> str:
    """Return one line for each model and seed of other data than the zoo's."""
    return _table(
        ("model", "attack", "fires", "seed", "verdict", "probability", "score", "cosine", "evaluations"),
        [
            (
                row["model"],
                row["attack"] or "",
                FIRES[row["fires"]],
                str(row["seed"]),
                row["word"],
                _number(row["probability"], 3),
                _number(row["score"], 1),
                _number(row.get("cosine")),
                _number(row["forward_equivalents"], 0),
            )
            for row in rows
        ],
    )


def attacks_table(methods: Mapping[str, Row]) -> str:
    """Return one line for each attack: how many of its models that fire are flagged by each method that is complete."""
    complete = {name: row["attacks"] for name, row in methods.items() if "attacks" in row}
    attacks = sorted(set().union(*complete.values()))
    return _table(
        ("attack", *complete),
        [(attack, *(_of(tally[attack]) for tally in complete.values())) for attack in attacks],
    )


def _of(tally: Row) -> str:
    return f"{tally['flagged']} of {tally['models']}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *lines = [f"| {' | '.join(line)} |" for line in (heads, *rows)]
    return "\n".join([head, "|---" * len(heads) + "|", *lines])


def _with_interval(row: Row, name: str) -> str:
    if row.get(name) is None:
        return ""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} ({low:.2f}, {high:.2f})"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
