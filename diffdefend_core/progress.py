"""Progress of long stages on stderr: a bar with the time left on a terminal, a rare plain line elsewhere.

A stage calls back with (what, done, total): what it does now, how many steps are done, how many there are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

Progress = Callable[[str, int, int], None]

SECONDS_BETWEEN_LINES = 30.0


def silent(what: str, done: int, total: int) -> None:
    """Report nothing: the callback of a stage that nobody watches."""


@contextmanager
def reporting(*, quiet: bool = False, color: bool = True, stream: IO[str] | None = None) -> Iterator[Progress | None]:
    """Yield the callback for a stage, or None if `quiet`; `stream` is stderr by default."""
    out = sys.stderr if stream is None else stream
    if quiet:
        yield None
    elif out.isatty():
        with _bar(out, color) as bar:
            yield bar
    else:
        yield PlainProgress(out)


class PlainProgress:
    """A callback for logs: the first call of each `what` writes a line, later ones at most one per 30 seconds."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._what, self._began, self._written = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Write one line if it is time for one."""
        now = self._clock()
        if what != self._what:
            self._what, self._began = what, now
        elif now - self._written < SECONDS_BETWEEN_LINES:
            return
        self._written = now
        self._stream.write(f"{what}: {done}/{total}{_time_left(now - self._began, done, total)}\n")
        self._stream.flush()


def _time_left(seconds: float, done: int, total: int) -> str:
    if seconds <= 0 or not 0 < done < total:
        return ""
    minutes, rest = divmod(round(seconds / done * (total - done)), 60)
    return f", about {minutes}:{rest:02d} left"


@contextmanager
def _bar(stream: IO[str], color: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Bar(*columns, console=Console(file=stream, no_color=not color)) as bar:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
