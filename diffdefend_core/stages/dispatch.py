"""Runs of the gate under a cap: begin, look after, give up. Where they run is behind the port `Runner`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from diffdefend_core.errors import DiffDefendError
from diffdefend_core.io.registry import model_uri

LOST_AFTER = 10

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One version that the gate has to decide on."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        """`models:/name/version`."""
        return model_uri(self.name, self.version)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that is over: its id, seconds, and the line that says why it failed, None if it did not."""

    job: Job
    run: str
    seconds: float
    error: str | None


class Runner(Protocol):
    """Where runs of the gate take place: processes of this machine, or Kubeflow Pipelines.

    `kind` names the place in summaries; `lasting` says whether runs go on when this process ends; `interval` is how
    many seconds to wait between two looks at the runs. Every method raises DiffDefendError where it cannot do what it
    should.
    """

    kind: str
    lasting: bool
    interval: float

    def begin(self, job: Job) -> str:
        """Start the gate for the version and return the id of the run; one that is under way is taken over."""

    def outcome(self, run: str) -> str | None:
        """Return None while the run is under way, then an empty text, or the line that says why it failed."""

    def stop(self, run: str) -> None:
        """End a run that takes too long."""


@dataclass
class _Active:
    job: Job
    run: str
    since: float
    errors: int = 0


class Dispatcher:
    """At most `cap` runs at a time, each of at most `limit` seconds; one that fails touches no other.

    `begun` is told the id of each run as soon as it is known.
    """

    def __init__(
        self, runner: Runner, *, cap: int, limit: float, clock: Callable[[], float] = time.monotonic,
        begun: Callable[[Job, str], None] = lambda job, run: None,
    ) -> None:  # fmt: skip
        self._runner, self._cap, self._limit, self._clock, self._begun = runner, cap, limit, clock, begun
        self._active: list[_Active] = []

    @property
    def free(self) -> int:
        """How many more runs may begin."""
        return max(0, self._cap - len(self._active))

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What is under way."""
        return tuple(active.job for active in self._active)

    def begin(self, job: Job) -> Ended | None:
        """Begin a run; return its end at once if it cannot begin."""
        if self.free < 1:
            raise RuntimeError("no run may begin: the cap is reached")
        try:
            run = self._runner.begin(job)
        except DiffDefendError as error:
            return Ended(job=job, run="", seconds=0.0, error=str(error))
        self.take_over(job, run)
        self._begun(job, run)
        return None

    def take_over(self, job: Job, run: str) -> None:
        """Look after a run that an earlier process began; it counts towards the cap."""
        self._active.append(_Active(job=job, run=run, since=self._clock()))

    def collect(self) -> list[Ended]:
        """Return the runs that are over by now."""
        looked_at = [(active, self._look(active)) for active in self._active]
        self._active = [active for active, ended in looked_at if ended is None]
        return [ended for _, ended in looked_at if ended is not None]

    def _look(self, active: _Active) -> Ended | None:
        seconds = self._clock() - active.since
        try:
            outcome = self._runner.outcome(active.run)
            active.errors = 0
            if outcome is None and seconds <= self._limit:
                return None
            if outcome is None:
                self._runner.stop(active.run)
                outcome = f"the run was stopped after {seconds / 60:.0f} minutes (--limit)"
        except DiffDefendError as error:
            active.errors += 1
            _LOG.warning("run %s: %s", active.run, error)
            if active.errors < LOST_AFTER:
                return None
            outcome = f"the run could not be looked at {LOST_AFTER} times in a row: {error.found}"
        return Ended(job=active.job, run=active.run, seconds=seconds, error=outcome or None)
