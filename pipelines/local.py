"""Run the compiled gate on this machine through kfp.local: each stage a process of its own, or a container.

kfp.local refuses to run container components as processes; `StageHandler` lifts its two checks. They are private API,
so kfp is pinned and tests/pipelines/test_local.py tells when a new version changes them.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from diffdefend_core.config import Settings, without_password
from diffdefend_core.errors import DiffDefendError, InputError, MissingExtraError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from kfp import local
    from kfp.local import status, subprocess_task_handler, task_dispatcher

from components.image import COMMAND, image
from diffdefend_core.stages.attestation import KEY_VARIABLE, read_key, signer
from diffdefend_core.stages.policies import read_policy
from pipelines.gate import gate_pipeline
from pipelines.placement import Placement

ERROR_PREFIX = "diffdefend: error: "
_HANDED_ON = (
    "AWS_", "MLFLOW_", "DIFFDEFEND_", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "NO_PROXY", "HF_TOKEN",
    "HF_ENDPOINT", "HF_HUB_OFFLINE",
)  # fmt: skip
# MLflow runs under these names. The stages that compute on the model know nothing of the registry.
_REGISTRY_STAGES = ("load", "register")
_SIGNING_STAGE, _SIGNING = "register", (KEY_VARIABLE, "DIFFDEFEND_SIGNING__KEY_FILE")
_REGISTRY_SECRETS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_REGISTRY_URIS = ("DIFFDEFEND_TRACKING_URI", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


class StageFailedError(DiffDefendError, RuntimeError):
    """Raised when a stage of a local run failed; its text is the stage's own line."""

    def __init__(self, found: str, *, expected: str = "a finished stage", action: str = "see --verbose") -> None:
        super().__init__(found, expected=expected, action=action)
        self.args = (found,)


@dataclass(kw_only=True)
class StageLog:
    """What the stages say: passed on to stderr, but for their error lines, the last of which is kept."""

    quiet: bool = False
    verbose: bool = False
    error: str = ""
    in_container: bool = False
    _rest: str = field(default="", repr=False)

    def flags(self) -> list[str]:
        """Return what a stage is told about its own log."""
        return ["--verbose"] * self.verbose + ["--quiet"] * self.quiet

    def line(self, text: str) -> None:
        """Take one line that a stage wrote to its stderr."""
        if text.strip().startswith(ERROR_PREFIX):
            self.error = text.strip().removeprefix(ERROR_PREFIX)
        elif not self.quiet:
            sys.stderr.write(f"{text.rstrip()}\n")

    def write(self, text: str) -> int:
        """Take what kfp.local prints to stdout: its own chatter is shown with `verbose` only, a container's log too."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            log = self.in_container and line.strip() and not line.strip().startswith("Found image")
            if self.verbose or log or line.strip().startswith(ERROR_PREFIX):
                self.line(line.removeprefix("    "))
        return len(text)

    def flush(self) -> None:
        """Do nothing: lines are passed on as they end."""


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
        environment = _for_stage(stage, {**os.environ, **self.environment, **self.env_vars})
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
        if process.returncode == 0:
            return status.Status.SUCCESS
        if not self.log.error:
            self.log.error = f"stage {stage} {_ending(process.returncode)}"
        return status.Status.FAILURE


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
    runner = _containers(source, settings) if docker else local.SubprocessRunner(use_venv=False)
    log = StageLog(quiet=quiet, verbose=verbose)
    arguments = {"source": source, "settings": settings.science_json(), "store": settings.store, "name": name}
    with tempfile.TemporaryDirectory(prefix="diffdefend-run-") as scratch, _handled(handler, settings, log, docker):
        os.makedirs(f"{scratch}/workspace")
        local.init(runner, pipeline_root=f"{scratch}/root", workspace_root=f"{scratch}/workspace")
        try:
            with redirect_stdout(log):  # type: ignore[type-var]
                outputs = gate_pipeline(Placement(retries=0))(**arguments).outputs
        except RuntimeError as error:
            raise StageFailedError(log.error or f"a stage ended without a message ({_plain(str(error))})") from error
    return dict(outputs)


def _container_handler(log: StageLog) -> type[Any]:
    """Return kfp.local's handler of containers, which tells `log` when a container speaks."""
    from kfp.local import docker_task_handler

    class ContainerHandler(docker_task_handler.DockerTaskHandler):
        def run(self) -> status.Status:
            stage = self.full_command[len(COMMAND)]
            arguments = self.runner.container_run_args
            self.env_vars = _for_stage(stage, {**arguments.get("environment", {}), **self.env_vars})
            self.full_command = [*self.full_command, *log.flags()]
            log.in_container = True
            try:
                return super().run()
            finally:
                log.in_container = False

    return ContainerHandler


@contextmanager
def _handled(handler: type[StageHandler], settings: Settings, log: StageLog, docker: bool) -> Iterator[None]:
    """Let kfp.local use our handlers, and keep its warnings about cluster options to itself."""
    bound = type("BoundStageHandler", (handler,), {"environment": _environment(settings), "log": log})
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(_replaced(subprocess_task_handler, "SubprocessTaskHandler", bound))
        if docker:
            container_handler = _container_handler(log)
            stack.enter_context(_replaced(task_dispatcher.docker_task_handler, "DockerTaskHandler", container_handler))
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _environment(settings: Settings) -> dict[str, str]:
    """Return the settings that say where to run and what may be loaded, for the stages.

    What changes a result travels as a parameter. Permissions do not: a run's parameters cannot grant them.
    """
    key_file = settings.signing.key_file
    return {
        "DIFFDEFEND_TRACKING_URI": settings.tracking_uri,
        "DIFFDEFEND_EXPERIMENT": settings.experiment,
        "DIFFDEFEND_DEVICE": settings.device,
        "DIFFDEFEND_ALLOW_PICKLES": str(settings.allow_pickles).lower(),
        "DIFFDEFEND_ALLOW_NETWORK": str(settings.allow_network).lower(),
        "DIFFDEFEND_SIGNING__VALID_DAYS": str(settings.signing.valid_days),
        "DIFFDEFEND_SIGNING__KEY_FILE": str(Path(key_file).expanduser().absolute()) if key_file else "",
    }


def _for_stage(stage: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a stage: credentials of the registry where it talks to it, the key where it signs."""
    withheld = () if stage == _SIGNING_STAGE else _SIGNING
    kept = {name: value for name, value in environment.items() if name not in withheld}
    if stage in _REGISTRY_STAGES:
        return kept
    kept = {name: value for name, value in kept.items() if name not in _REGISTRY_SECRETS}
    uris = {name: without_password(kept[name]) for name in _REGISTRY_URIS if name in kept}
    return kept | uris


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), which the kernel does when the memory is used up; expected room for the model and "
            "its batches; use a larger machine, and run it again: finished stages are kept"
        )
    return f"ended with code {code} and without a message"


def _containers(source: str, settings: Settings) -> local.DockerRunner:
    """Return the runner for containers: as this user, with the folders of model, store and MLflow mounted."""
    try:
        import docker
    except ImportError as error:
        raise MissingExtraError(
            "docker is not installed", expected="the extra [pipelines]", action="pip install 'diffdefend[pipelines]'"
        ) from error
    _check_docker(docker)
    folders = {_folder(settings.store): False, _folder(settings.tracking_uri, parent=True): False}
    folders.setdefault(_folder(source), True)
    mounts = []
    for folder, read_only in folders.items():
        if folder is not None:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            mounts.append(docker.types.Mount(str(folder), str(folder), type="bind", read_only=read_only))
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
    key = read_key(settings)
    if key is not None:  # its file is not mounted
        handed_on[KEY_VARIABLE] = key.decode("utf-8", errors="replace")
    return local.DockerRunner(
        environment={**handed_on, **_environment(settings), "DIFFDEFEND_SIGNING__KEY_FILE": "", "HOME": "/tmp"},
        user=f"{os.getuid()}:{os.getgid()}",
        mounts=mounts,
        network_mode=os.environ.get("DIFFDEFEND_DOCKER_NETWORK", "bridge"),
    )


def _check_docker(docker: ModuleType) -> None:
    """Raise InputError if no daemon answers or an image is absent: kfp.local would try to pull it by name."""
    try:
        client = docker.from_env(timeout=10)
        client.ping()
    except docker.errors.DockerException as error:
        raise InputError(
            "no docker daemon answers", expected="one at DOCKER_HOST or the default socket",
            action="start it, or run without --docker",
        ) from error  # fmt: skip
    for target in ("cpu", "gpu"):
        try:
            client.images.get(image(target))
        except docker.errors.ImageNotFound as error:
            raise InputError(
                f"there is no image {image(target)}", expected="the images of the stages on this machine",
                action=f"docker build --target {target} -t {image(target)} -f docker/Dockerfile .",
            ) from error  # fmt: skip


def _folder(uri: str, *, parent: bool = False) -> Path | None:
    """Return the local folder that `uri` names (with `parent`, that of its file), None if it is elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file", "sqlite"):
        return None
    path = Path(unquote(parts.path[1:] if parts.scheme == "sqlite" else parts.path)).absolute()
    return path.parent if parent else path


def _plain(text: str) -> str:
    """Return the text without colours, on one line."""
    return " ".join(re.sub(r"\x1b\[\d+m", "", text).split())
