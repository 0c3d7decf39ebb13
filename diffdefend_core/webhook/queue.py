"""The work behind the receiver: one thread that looks at each version and lets the gate decide, under the cap.

What waits is kept in memory: MLflow's events are a nudge, and the nightly `scan-registry` finds what was lost.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from diffdefend_core.config import Settings
from diffdefend_core.errors import DiffDefendError
from diffdefend_core.io import registry
from diffdefend_core.report.registry_document import ScanRow, Status
from diffdefend_core.stages.dispatch import Dispatcher, Ended, Job, Runner
from diffdefend_core.stages.registry_scan import Surveyor
from diffdefend_core.webhook.metrics import Metrics

LONGEST = 10_000

_LOG = logging.getLogger(__name__)


class WorkQueue:
    """Versions that wait, and the thread that works on them. Raises InputError at settings that cannot be used."""

    def __init__(self, settings: Settings, runner: Runner, metrics: Metrics, *, jobs: int, limit: float) -> None:
        self._uri, self._runner, self._metrics = settings.tracking_uri, runner, metrics
        self._surveyor = Surveyor(settings)
        self._dispatcher = Dispatcher(runner, cap=jobs, limit=limit)
        self._waiting: deque[Job] = deque()
        self._changed, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="diffdefend-queue", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more, and wait for the thread; runs under way are left to the runner."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def put(self, job: Job) -> bool:
        """Let the version wait, once; return False if too many do."""
        with self._changed:
            if job not in self._waiting:
                if len(self._waiting) >= LONGEST:
                    return False
                self._waiting.append(job)
                self._measure()
            self._changed.notify_all()
            return True

    def _work(self) -> None:
        while not self._stopped:
            job = self._next()
            if job is not None:
                self._look_at(job)
            for ended in self._dispatcher.collect():
                self._ended(ended)
            self._measure()

    def _next(self) -> Job | None:
        """Return what to look at next; wait for it, or while runs are under way for a moment."""
        with self._changed:
            if self._stopped or (self._dispatcher.free and self._ready() is not None):
                pass
            else:
                self._changed.wait(self._runner.interval if self._dispatcher.jobs else None)
            job = self._ready() if self._dispatcher.free and not self._stopped else None
            if job is not None:
                self._waiting.remove(job)
            return job

    def _ready(self) -> Job | None:
        """Return the first that waits and is not under way: a version is never run twice at a time."""
        under_way = set(self._dispatcher.jobs)
        return next((job for job in self._waiting if job not in under_way), None)

    def _look_at(self, job: Job) -> None:
        try:
            skipped = self._surveyor.skipped(registry.version_of(self._uri, job.name, job.version))
        except DiffDefendError as error:
            self._ended(Ended(job=job, run="", seconds=0.0, error=str(error)))
            return
        if skipped is not None:
            self._tell(skipped)
            return
        refused = self._dispatcher.begin(job)
        if refused is not None:
            self._ended(refused)

    def _ended(self, ended: Ended) -> None:
        self._tell(self._surveyor.ended(ended))

    def _tell(self, row: ScanRow) -> None:
        self._metrics.dealt_with(row)
        level = logging.WARNING if row.status is Status.FAILED or row.blocked else logging.INFO
        _LOG.log(level, "models:/%s/%s %s %s: %s", row.model, row.version, row.status, row.verdict, row.reason)

    def _measure(self) -> None:
        self._metrics.queue.set(len(self._waiting))
        self._metrics.running.set(len(self._dispatcher.jobs))
