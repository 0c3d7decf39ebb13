"""Runs of the gate on this machine, for scans of a registry: each in a process of its own.

kfp.local keeps its state in the process, and a model that eats all memory takes its process with it: so one each.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from diffdefend_core.config import Settings
from diffdefend_core.errors import RegistryError
from diffdefend_core.stages.dispatch import Job

COMMAND = (sys.executable, "-m", "pipelines.one_run")
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class _Running:
    process: subprocess.Popen[str]
    output: IO[str]


class LocalRuns:
    """Starts `pipelines.one_run`; ends what is under way when it is closed. A `Runner` of `stages.dispatch`."""

    kind, lasting = "local", False
    interval = 0.2

    def __init__(
        self, settings: Settings, *, quiet: bool = True, verbose: bool = False, command: tuple[str, ...] = COMMAND
    ) -> None:
        self._settings, self._command = settings.model_dump(mode="json"), command
        self._flags = {"quiet": quiet, "verbose": verbose}
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> "LocalRuns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in list(self._running):
            self.stop(run)

    def begin(self, job: Job) -> str:
        """Start a process for the version. Raises RegistryError if none can be started."""
        request = json.dumps({"source": job.uri, "settings": self._settings, **self._flags})
        output = tempfile.TemporaryFile("w+", prefix="diffdefend-run-")  # noqa: SIM115 (closed when the run has ended)
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=output, text=True, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(request + "\n")
            process.stdin.flush()
        except OSError as error:
            output.close()
            raise RegistryError(
                f"no run can be started ({error.strerror})", expected="room for a process",
                action="use fewer --jobs, or free memory",
            ) from error  # fmt: skip
        run = f"{process.pid}-{uuid.uuid4().hex[:8]}"
        self._running[run] = _Running(process, output)
        return run

    def outcome(self, run: str) -> str | None:
        """Return None while the process works, then an empty text or why it failed."""
        running = self._running[run]
        code = running.process.poll()
        if code is None:
            return None
        answer = self._closed(run)
        if "result" in answer:
            return ""
        told = f"the process was ended by signal {-code}" if code < 0 else f"the process ended with code {code}"
        return str(answer.get("error") or f"{told} and without a message (memory?)")

    def stop(self, run: str) -> None:
        """End the process and its stages."""
        process = self._running[run].process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._closed(run)

    def _closed(self, run: str) -> dict[str, Any]:
        running = self._running.pop(run)
        with running.output as file:
            file.seek(0)
            lines = file.read().splitlines()
        if running.process.stdin is not None:
            running.process.stdin.close()
        try:
            answer = json.loads(lines[-1])
        except (IndexError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}
