"""What the receiver counts, in the text format of Prometheus. Labels are closed words: no name from outside is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diffdefend_core.artifacts import Word
from diffdefend_core.errors import DiffDefendError
from diffdefend_core.report.registry_document import ScanRow, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800)


class Metrics:
    """The counters of one receiver, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.deliveries = Counter("diffdefend_deliveries", "Deliveries by answer", ["answer"], registry=registry)
        self.scanned = Counter("diffdefend_scanned", "Versions that the gate decided on", registry=registry)
        self.skipped = Counter("diffdefend_skipped", "Versions with a decision that stands", registry=registry)
        self.failures = Counter("diffdefend_failures", "Versions whose run failed", registry=registry)
        self.verdicts = Counter("diffdefend_verdicts", "Verdicts by word", ["verdict"], registry=registry)
        self.blocked = Counter("diffdefend_blocked", "Decisions against a version", registry=registry)
        self.seconds = Histogram("diffdefend_run_seconds", "Time of a run", buckets=_SECONDS, registry=registry)
        self.queue = Gauge("diffdefend_queue_length", "Versions that wait", registry=registry)
        self.running = Gauge("diffdefend_runs_under_way", "Runs under way", registry=registry)
        for word in Word:
            self.verdicts.labels(word.value)
        for answer in ("queued", "ignored", "duplicate", "refused"):
            self.deliveries.labels(answer)

    def watch(
        self, count: Callable[[], int], *, every: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show `count`, the versions in production without a decision that stands; asked for once in `every` seconds.

        It is NaN while the registry does not answer.
        """
        asked: list[tuple[float, float]] = []

        def current() -> float:
            now = clock()
            if not asked or now - asked[-1][0] >= every:
                try:
                    asked[:] = [(now, float(count()))]
                except DiffDefendError:
                    asked[:] = [(now, math.nan)]
            return asked[-1][1]

        gauge = Gauge(
            "diffdefend_unscanned_champions", "Versions in production without a decision that stands",
            registry=self._registry,
        )  # fmt: skip
        gauge.set_function(current)

    def dealt_with(self, row: ScanRow) -> None:
        """Count what became of a version."""
        if row.status is Status.SKIPPED:
            self.skipped.inc()
            return
        self.seconds.observe(row.seconds)
        if row.status is Status.FAILED:
            self.failures.inc()
            return
        self.scanned.inc()
        self.blocked.inc(int(row.blocked))
        if row.verdict in set(Word):
            self.verdicts.labels(row.verdict).inc()

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)
