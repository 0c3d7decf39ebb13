"""The stages of a local run as containers: which image, user, folders and variables each gets, and how it ends.

kfp.local's own handler of containers mounts all folders into all stages, leaves the container running when the run is
interrupted, and takes a container that is gone before it was asked for as one that succeeded; `handler` returns ours.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from kfp import local
from kfp.local import status

from components.image import COMMAND, image
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError, MissingExtraError
from diffdefend_core.io.store import local_path, to_uri
from diffdefend_core.stages.policies import settled
from pipelines.placement import USER
from pipelines.stage_environment import CERTIFICATES, LOAD, REGISTRY_STAGES, for_stage, of_containers
from pipelines.stage_log import StageLog

_COMPUTING = ("invert-trigger", "detect", "purify", "evaluate")
_FILES = ("extractor_weights", "lpips_weights", "known_trigger", "reference")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WORDS = ("", "self", "shipped")  # in the place of a path


@dataclass(frozen=True)
class Folder:
    """A file or folder of this machine that the containers of some stages see at the same path; no stages: all."""

    path: Path
    stages: tuple[str, ...] = ()
    writable: bool = False


def user() -> tuple[int, int]:
    """Return user and group of the containers: those of this process, but never root."""
    return (os.getuid(), os.getgid()) if os.getuid() else (USER, USER)


def give(folder: Path) -> None:
    """Make the folder with what is above it, for the containers to write into. Raises InputError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder} ({error.strerror})", expected="a writable place", action="pick another"
        ) from error
    if not os.getuid():
        for path in missing:
            os.chown(path, *user())


def inside(settings: Settings) -> Settings:
    """Return the settings as a container can read them: local places by absolute URIs, versions by their sources.

    Stages that compute cannot ask the registry which model `models:/name/version` is. Raises InputError, RegistryError.
    """
    settings = settled(settings)
    evaluation = {name: _placed(getattr(settings.evaluation, name), settings) for name in _FILES}
    groups = {
        "inversion": dataclasses.replace(settings.inversion, reference=_placed(settings.inversion.reference, settings)),
        "detection": dataclasses.replace(
            settings.detection, calibration=_placed(settings.detection.calibration, settings)
        ),
        "evaluation": dataclasses.replace(settings.evaluation, **evaluation),
    }
    return settings.model_copy(update=groups)


def runner(source: str, settings: Settings) -> local.DockerRunner:
    """Return the runner of containers: not root, without capabilities, nothing writable but /tmp and what is mounted.

    `settings` are those of `inside`. Raises InputError if no daemon answers, an image is absent, or a container could
    not reach or write what it must.
    """
    docker = _docker()
    _check_docker(docker)
    network = os.environ.get("DIFFDEFEND_DOCKER_NETWORK", "bridge")
    environment = of_containers(settings)
    _check_addresses(network, environment)
    folders = _folders(source, settings)
    for folder in folders:
        _check_writable(folder)
    return local.DockerRunner(
        environment=environment,
        mounts=folders,
        user="{}:{}".format(*user()),
        network_mode=network,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )


def handler(log: StageLog) -> type[Any]:
    """Return the handler of containers for kfp.local: each stage with its own folders and variables, watched to its
    end by its exit code, and removed whatever happens. `log` gets its stderr."""
    from kfp.local import docker_task_handler

    class ContainerHandler(docker_task_handler.DockerTaskHandler):
        def run(self) -> status.Status:
            docker = _docker()
            stage = self.full_command[len(COMMAND)]
            arguments = dict(self.runner.container_run_args)
            environment = for_stage(stage, self.env_vars)  # kfp.local has put the runner's in
            mounts = _mounts(docker, stage, arguments.pop("mounts"))
            try:
                with closing(docker.from_env()) as client:
                    container = client.containers.create(
                        self.image, [*self.full_command, *log.flags()], environment=environment, mounts=mounts,
                        volumes=self.get_volumes_to_mount(client), **arguments,
                    )  # fmt: skip
                    try:
                        code = _watched(container, log)
                    finally:
                        container.remove(force=True, v=True)
            except (docker.errors.DockerException, OSError) as error:
                log.error = (
                    f"the container of stage {stage} cannot be run ({' '.join(str(error).split())}); expected a daemon "
                    "on this machine that runs it; check DOCKER_HOST, DIFFDEFEND_DOCKER_NETWORK and the disk"
                )
                return status.Status.FAILURE
            log.ended(stage, code)
            return status.Status.SUCCESS if code == 0 else status.Status.FAILURE

    return ContainerHandler


def _watched(container: Any, log: StageLog) -> int:
    """Run the container, pass on its stderr; return its exit code, negative for a signal."""
    container.start()
    for line in _lines(container.logs(stdout=False, stderr=True, stream=True, follow=True)):
        log.line(line)
    code = int(container.wait()["StatusCode"])
    return code if code <= 128 else 128 - code  # its init passes a signal on as 128 + number


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _mounts(docker: ModuleType, stage: str, folders: Iterable[Folder]) -> list[Any]:
    """Return the mounts of a stage: its folders, and /tmp on the daemon's disk: weights need not fit the memory."""
    return [docker.types.Mount("/tmp", None, type="volume")] + [
        docker.types.Mount(str(folder.path), str(folder.path), type="bind", read_only=not folder.writable)
        for folder in folders
        if not folder.stages or stage in folder.stages
    ]


def _folders(source: str, settings: Settings) -> list[Folder]:
    """Return what the stages see of this machine. What is read but is not there is left to the stage to complain of."""
    store, database = local_path(settings.store), _database(settings.tracking_uri)
    written = [Folder(store, writable=True)] if store else []
    written += [Folder(database.parent, REGISTRY_STAGES, writable=True)] if database else []
    for folder in written:
        give(folder.path)
    named = [getattr(settings.evaluation, name) for name in _FILES]
    named += [settings.inversion.reference, settings.detection.calibration]
    read = [(_placed(source, settings), (LOAD,)), *((place, _COMPUTING) for place in named)]
    read += [(os.environ.get(name, ""), ()) for name in CERTIFICATES]
    found = {(path, stages): Folder(path, stages) for place, stages in read if (path := _existing(place)) is not None}
    taken = {folder.path for folder in written}
    return [*written, *(folder for folder in _distinct(found.values()) if folder.path not in taken)]


def _distinct(folders: Iterable[Folder]) -> list[Folder]:
    """Return the folders with each path once: for the stages of both where two name it."""
    merged: dict[Path, Folder] = {}
    for folder in folders:
        other = merged.get(folder.path, folder)
        stages = tuple(dict.fromkeys((*other.stages, *folder.stages))) if other.stages and folder.stages else ()
        merged[folder.path] = Folder(folder.path, stages)
    return list(merged.values())


def _placed(named: str, settings: Settings) -> str:
    """Return a local path as a URI and a version of the registry as its source; words and other URIs as they are."""
    if named.startswith("models:"):
        from diffdefend_core.io import registry

        return to_uri(registry.resolve(settings.tracking_uri, named).source_uri)
    return to_uri(named) if named not in _WORDS and os.path.exists(named) else named


def _existing(place: str) -> Path | None:
    path = local_path(to_uri(place)) if place not in _WORDS else None
    return path if path is not None and path.exists() else None


def _database(tracking_uri: str) -> Path | None:
    """Return the file of an SQLite database, the place of a registry in files, None for a server."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("", "file", "sqlite"):
        return None
    return Path(unquote(parts.path[1:] if parts.scheme == "sqlite" else parts.path)).absolute()


def _docker() -> ModuleType:
    try:
        import docker
    except ImportError as error:
        raise MissingExtraError(
            "docker is not installed", expected="the extra [pipelines]", action="pip install 'diffdefend[pipelines]'"
        ) from error
    return docker


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


def _check_addresses(network: str, environment: dict[str, str]) -> None:
    """Raise InputError at an address of this machine alone, which a container of another network cannot reach."""
    if network == "host":
        return
    for name in ("DIFFDEFEND_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "DIFFDEFEND_TRACKING_URI"):
        host = urlsplit(environment.get(name, "")).hostname
        if host in _LOOPBACK:
            raise InputError(
                f"{name} names {host}, which is the container itself on the docker network {network!r}",
                expected="an address that containers reach",
                action="name this machine by its address, or set DIFFDEFEND_DOCKER_NETWORK=host",
            )


def _check_writable(folder: Folder) -> None:
    """Raise InputError if this process is root and the folder is not for the user of the containers to write."""
    if os.getuid() or not folder.writable:
        return
    number, group = user()
    for path in (folder.path, *folder.path.glob("*.db")):
        facts = path.stat()
        if facts.st_uid != number and not (facts.st_gid == group and facts.st_mode & 0o020) and not facts.st_mode & 0o2:
            raise InputError(
                f"{path} belongs to user {facts.st_uid}, and containers never run as root",
                expected=f"a place that user {number} may write",
                action=f"chown -R {number}:{group} {folder.path}, or run as another user than root",
            )
