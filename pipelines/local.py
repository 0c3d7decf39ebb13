"""Run the compiled gate on this machine through kfp.local: each stage a process of its own, or a container.

kfp.local refuses to run container components as processes; `StageHandler` lifts its two checks. They are private API,
so kfp is pinned and tests/pipelines/test_local.py tells when a new version changes them.
"""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from diffdefend_core.config import Settings
from diffdefend_core.errors import DiffDefendError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from kfp import local
    from kfp.local import status, subprocess_task_handler, task_dispatcher

from components.image import COMMAND
from diffdefend_core.stages.attestation import signer
from diffdefend_core.stages.policies import read_policy
from pipelines import containers
from pipelines.gate import gate_pipeline
from pipelines.placement import Placement
from pipelines.stage_environment import for_stage, of_settings
from pipelines.stage_log import StageLog


class StageFailedError(DiffDefendError, RuntimeError):
    """Raised when a stage of a local run failed; its text is the stage's own line."""

    def __init__(self, found: str, *, expected: str = "a finished stage", action: str = "see --verbose") -> None:
        super().__init__(found, expected=expected, action=action)
        self.args = (found,)


class StageHandler(subprocess_task_handler.SubprocessTaskHandler):
    """Runs a container component as a process of this Python. `environment` and `log` are set per run."""

    environment: ClassVar[Mapping[str, str]] = {}
    log: ClassVar[StageLog] = StageLog()

    def validate_image(self, image: str) -> None:
        """Accept every image: none is used."""

    def validate_not_container_component(self, full_command: list[str]) -> None:
        """Accept container components."""

    def command(self) -> list[str]:
        """Return the command of the process.

        Only its first word is replaced: kfp.local would change every `python3` in every argument, paths included.
        """
        first, *others = self.full_command
        return [sys.executable if first == "python3" else first, *others, *self.log.flags()]

    def run(self) -> status.Status:
        """Run the stage; its stderr goes to the log line by line, its stdout (the URI) is not needed."""
        stage = self.full_command[len(COMMAND)]
        environment = for_stage(stage, {**os.environ, **self.environment, **self.env_vars})
        process = subprocess.Popen(
            self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            env=environment,
        )  # fmt: skip
        with process:
            try:
                for line in process.stderr or ():
                    self.log.line(line)
            except BaseException:
                process.terminate()
                raise
        self.log.ended(stage, process.returncode)
        return status.Status.SUCCESS if process.returncode == 0 else status.Status.FAILURE


def run_gate(
    source: str, settings: Settings, *, name: str = "", docker: bool = False, quiet: bool = False,
    verbose: bool = False, handler: type[StageHandler] = StageHandler,
) -> dict[str, Any]:  # fmt: skip
    """Run the gate for the model at `source` and return what it leaves, by the names of `gate.GateOutputs`.

    Stages run as processes, with `docker` as containers. Raises StageFailedError with the stage's own line, InputError
    if no docker daemon answers.
    """
    if "://" not in source and os.path.exists(source):
        source = str(Path(source).absolute())
    read_policy(settings), signer(settings)  # what is wrong with them shows now, not after the scan
    if docker:
        settings = containers.inside(settings)
    runner = containers.runner(source, settings) if docker else local.SubprocessRunner(use_venv=False)
    log = StageLog(quiet=quiet, verbose=verbose)
    arguments = {"source": source, "settings": settings.science_json(), "store": settings.store, "name": name}
    with tempfile.TemporaryDirectory(prefix="diffdefend-run-") as scratch, _handled(handler, settings, log, docker):
        for place in ("root", "workspace"):
            containers.give(Path(scratch) / place)
        local.init(runner, pipeline_root=f"{scratch}/root", workspace_root=f"{scratch}/workspace")
        try:
            with redirect_stdout(log):  # type: ignore[type-var]
                outputs = gate_pipeline(Placement(retries=0))(**arguments).outputs
        except RuntimeError as error:
            raise StageFailedError(log.error or f"a stage ended without a message ({_plain(str(error))})") from error
    return dict(outputs)


@contextmanager
def _handled(handler: type[StageHandler], settings: Settings, log: StageLog, docker: bool) -> Iterator[None]:
    """Let kfp.local use our handlers, and keep its warnings about cluster options to itself."""
    bound = type("BoundStageHandler", (handler,), {"environment": of_settings(settings), "log": log})
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(_replaced(subprocess_task_handler, "SubprocessTaskHandler", bound))
        if docker:
            replaced = _replaced(task_dispatcher.docker_task_handler, "DockerTaskHandler", containers.handler(log))
            stack.enter_context(replaced)
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _plain(text: str) -> str:
    """Return the text without colours, on one line."""
    return " ".join(re.sub(r"\x1b\[\d+m", "", text).split())
