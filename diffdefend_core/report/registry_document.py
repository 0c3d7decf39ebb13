"""The summary of a registry scan: rows, counts, JSON and one HTML page whose table can be sorted.

The page holds one script, which sorts and filters; its content security policy allows that script by its digest alone,
and nothing from outside.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from typing import Any

from diffdefend_core.records import Record
from diffdefend_core.report.pages import template
from diffdefend_core.report.text import ABSENT


class Status(StrEnum):
    """What a registry scan did with a version."""

    SKIPPED = "skipped"
    SCANNED = "scanned"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True, kw_only=True)
class ScanRow(Record):
    """One version: what was done with it, what the gate decided, and why.

    `verdict` and `outcome` are closed words, empty where nothing is decided; `passed` is what the signed decision says,
    or without a signature the tags. `reason` is a sentence for people, `seconds` the time of its run.
    """

    model: str
    version: str
    status: Status
    verdict: str = ""
    outcome: str = ""
    passed: bool = False
    reason: str = ""
    aliases: tuple[str, ...] = ()
    seconds: float = 0.0
    run: str = ""
    report: str = ""

    @property
    def blocked(self) -> bool:
        """Whether the gate decided, and not in favour of this version."""
        return bool(self.outcome) and not self.passed


@dataclass(frozen=True, kw_only=True)
class ScanSummary(Record):
    """A registry scan as a whole; times are `2026-01-31T12:00:00Z`, `listed` counts before `since` is applied."""

    tool: str = "diffdefend"
    code_version: str
    scan: str
    registry: str
    runner: str
    policy_digest: str
    config_digest: str
    only: tuple[str, ...]
    since: str
    dry_run: bool
    resumed: bool
    started: str
    seconds: float
    listed: int
    versions: tuple[ScanRow, ...]

    def counts(self) -> dict[str, int]:
        """Return how many versions were skipped, scanned, failed, are waiting, and are blocked."""
        found = Counter(row.status.value for row in self.versions)
        return {**{status.value: found[status.value] for status in Status}, "blocked": self.blocked}

    @property
    def blocked(self) -> int:
        """How many versions the gate decided against, now or before."""
        return sum(row.blocked for row in self.versions)

    def document(self) -> dict[str, Any]:
        """Return the summary as plain JSON values, with the counts."""
        plain = dataclasses.asdict(self)
        for row in plain["versions"]:
            row.pop("schema_version")
        return {**plain, "counts": self.counts()}


def render_json(summary: ScanSummary) -> str:
    """Return the summary as JSON."""
    return json.dumps(summary.document(), indent=2, sort_keys=True, allow_nan=False) + "\n"


def render_html(summary: ScanSummary) -> str:
    """Return the summary as one HTML page."""
    from markupsafe import Markup

    script = resources.files("diffdefend_core.report").joinpath("templates", "registry.js").read_text(encoding="utf-8")
    return template("registry.html.j2").render(
        summary=summary,
        rows=sorted(summary.versions, key=_urgency),
        counts=summary.counts(),
        absent=ABSENT,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _urgency(row: ScanRow) -> tuple[int, str, int]:
    """Sort what failed first, then what is blocked, then what waits or was scanned, then what was skipped."""
    rank = 0 if row.status is Status.FAILED else 1 if row.blocked else 3 if row.status is Status.SKIPPED else 2
    return rank, row.model, int(row.version) if row.version.isdecimal() else 0
