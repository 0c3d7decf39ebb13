"""The gate as a user runs it with `--docker`: kfp.local's DockerRunner, the built images, a real S3 server.

While it runs each container is asked who it is and what it may do, and the daemon what it was given.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from docker_images import NAME
from s3_server import S3Server
from tiny_scan import calibration_for, flags_of, repairing_flags, tiny_settings

from diffdefend_core.config import Settings
from diffdefend_core.io import folders, registry
from diffdefend_core.io.store import open_store
from diffdefend_core.stages.keys import write_key
from pipelines.demo import ENTRIES, ZOO, Entry, settings_for

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.s3]

ROOT = Path(__file__).parents[2]
USER = (os.getuid(), os.getgid()) if os.getuid() else (10001, 10001)
ASK = "cat /proc/1/status; touch /opt/x 2>/dev/null || echo read-only"
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": {"load", "register"},
    "HF_TOKEN": {"load"},
    "DIFFDEFEND_KFP_TOKEN": set(),
    "DIFFDEFEND_SIGNING_KEY": {"register"},
}
DOCKER = ("--docker", "-o", "json")
COMPUTING = {"invert-trigger", "detect", "purify", "evaluate"}
CLEAN = ["load", "invert-trigger", "detect", "keep", "evaluate", "register"]
BACKDOORED = ["load", "invert-trigger", "detect", "purify", "evaluate", "register"]


@dataclass
class Seen:
    """One container of a run: what the daemon was told, and what the process inside finds."""

    stage: str
    facts: dict[str, Any]
    inside: str

    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.facts["Config"]["Env"])

    def binds(self) -> dict[str, bool]:
        """Return the mounted paths of this machine and whether they can be written."""
        return {mount["Source"]: mount["RW"] for mount in self.facts["Mounts"] if mount["Type"] == "bind"}

    def status(self) -> dict[str, str]:
        lines = (line.split(":", 1) for line in self.inside.splitlines() if ":" in line)
        return {name: " ".join(value.split()) for name, value in lines}


@dataclass
class Watch:
    """Asks every container of the test images as it starts."""

    seen: list[Seen] = field(default_factory=list)

    def follow(self, client: Any, events: Any) -> None:
        for event in events:
            with contextlib.suppress(importlib.import_module("docker").errors.DockerException):
                container = client.containers.get(event["id"])
                facts = container.attrs
                stage = facts["Config"]["Cmd"][3]
                self.seen.append(Seen(stage, facts, ""))
                self.seen[-1].inside = container.exec_run(["sh", "-c", ASK]).output.decode()


@pytest.fixture
def watch(cpu_image: str, gpu_image: str) -> Iterator[Watch]:
    client = importlib.import_module("docker").from_env()
    wanted = {"type": "container", "event": "start", "image": [cpu_image, gpu_image]}
    events, watch = client.events(decode=True, filters=wanted), Watch()
    thread = threading.Thread(target=watch.follow, args=(client, events), daemon=True)
    thread.start()
    yield watch
    events.close()
    assert client.containers.list(all=True, filters={"ancestor": [cpu_image, gpu_image]}) == []
    client.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of the user that containers run as, and in it one for the registry."""
    (tmp_path / "registry").mkdir()
    owned(tmp_path)
    return tmp_path


def owned(folder: Path) -> None:
    """Give the folder and all that is in it to the user of the containers."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, *USER)


def environment_of(server: S3Server, key: Path | None = None) -> dict[str, str]:
    """Return the environment of the command: secrets of all kinds, of which each stage may see only its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HF_", "DIFFDEFEND_"))}
    given = {
        "DIFFDEFEND_IMAGE": f"{NAME}:{{target}}",
        "DIFFDEFEND_DOCKER_NETWORK": "host",
        "DIFFDEFEND_S3_ENDPOINT": server.endpoint,
        "MLFLOW_TRACKING_USERNAME": "gate",
        "MLFLOW_TRACKING_PASSWORD": "canary-of-the-registry",
        "HF_TOKEN": "canary-of-the-hub",
        "DIFFDEFEND_KFP_TOKEN": "canary-of-the-cluster",
        "OMP_NUM_THREADS": "1",
    }
    return {**kept, **given, **({"DIFFDEFEND_SIGNING__KEY_FILE": str(key)} if key else {})}


def diffdefend(*arguments: str, environment: dict[str, str], place: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffdefend_core", *arguments]
    return subprocess.run(
        command, cwd=place, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def put(folder: Path, uri: str) -> None:
    """Put the model of a folder into the store."""
    store, prefix = open_store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(prefix + path.relative_to(folder).as_posix(), path)


def registered(settings: Settings, source: str, name: str) -> str:
    """Register the model as a team would; return the `models:/` URI."""
    registry.register_source(settings.tracking_uri, name, source, {registry.DIGEST_TAG: "unknown"})
    owned(Path(settings.tracking_uri.removeprefix("sqlite:///")).parent)
    return f"models:/{name}/1"


def assert_locked_down(watch: Watch, stages: list[str]) -> None:
    assert [seen.stage for seen in watch.seen] == stages
    for seen in watch.seen:
        status, host = seen.status(), seen.facts["HostConfig"]
        assert status["Uid"] == " ".join([str(USER[0])] * 4) and status["Gid"] == " ".join([str(USER[1])] * 4), seen
        assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16} and status["NoNewPrivs"] == "1"
        assert "read-only" in seen.inside and host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
        assert seen.facts["Config"]["Image"] == f"{NAME}:{'gpu' if seen.stage in COMPUTING else 'cpu'}"


def assert_least_privilege(watch: Watch, secrets: dict[str, set[str]]) -> None:
    """Each secret is where it is needed and nowhere else; the store's keys are everywhere."""
    stages = {seen.stage for seen in watch.seen}
    for secret, allowed in secrets.items():
        assert {seen.stage for seen in watch.seen if seen.environment().get(secret)} == allowed & stages, secret
    assert all(seen.environment()["AWS_SECRET_ACCESS_KEY"] for seen in watch.seen)


def test_a_clean_model_in_a_folder_is_promoted_and_signed(
    watch: Watch, place: Path, pristine_model: Path, s3_environment: S3Server
) -> None:
    model = shutil.copytree(pristine_model, place / "tiny")
    owned(model)  # diffusers writes its weights for their owner alone
    calibration = calibration_for(place / "calibration", "clean")
    key = write_key(place / "keys")
    settings = tiny_settings(
        place, calibration, store=f"s3://{s3_environment.bucket()}/store",
        tracking_uri=f"sqlite:///{place}/registry/mlflow.db",
    )  # fmt: skip
    environment = environment_of(s3_environment, Path(key["private_file"]))
    # a relative path and the container's network: what this machine names must be found in there
    run = diffdefend(
        "run", "./tiny", "--docker", "-o", "json", *flags_of(settings), environment=environment, place=place
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["word"], result["outcome"]) == ("clean", "promoted")
    assert_locked_down(watch, CLEAN)
    assert_least_privilege(watch, SECRETS)
    mounted = {seen.stage: seen.binds() for seen in watch.seen}
    assert {stage for stage, binds in mounted.items() if str(model) in binds} == {"load"}
    assert {stage for stage, binds in mounted.items() if str(place / "registry") in binds} == {"load", "register"}
    assert not any(binds.get(str(model)) or str(place / "keys") in binds for binds in mounted.values())
    assert "canary" not in run.stdout + run.stderr
    trusted = ["--set", f"signing.trusted_keys={place / 'keys'}", *flags_of(settings)]
    check = diffdefend("gate", "check", "models:/tiny@champion", *trusted, environment=environment, place=place)
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_backdoored_version_in_s3_is_repaired(
    watch: Watch, place: Path, pristine_model: Path, s3_environment: S3Server
) -> None:
    bucket, tracking_uri = s3_environment.bucket(), f"sqlite:///{place}/registry/mlflow.db"
    settings = tiny_settings(
        place, store=f"s3://{bucket}/store", tracking_uri=tracking_uri,
        **repairing_flags(place / "repairing", pristine_model),
    )  # fmt: skip
    put(pristine_model, f"s3://{bucket}/in/tiny/")
    uri = registered(settings, f"s3://{bucket}/in/tiny/", "tiny")
    flags = [*flags_of(settings), "--set", 'gate.policy={"version": 1, "rules": []}', "--set", "detection.limit=0.1"]
    run = diffdefend(
        "run", uri, "--docker", "-o", "json", *flags, environment=environment_of(s3_environment), place=place
    )
    assert run.returncode == 1, run.stderr
    result = json.loads(run.stdout)
    assert (result["word"], result["outcome"]) == ("backdoored", "repaired")
    assert_locked_down(watch, BACKDOORED)
    assert_least_privilege(watch, {**SECRETS, "DIFFDEFEND_SIGNING_KEY": set()})
    assert registry.resolve(tracking_uri, "models:/tiny@challenger").source_uri == f"{result['candidate_uri']}model/"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_demo_models_go_through_the_images(
    watch: Watch, place: Path, s3_environment: S3Server, entry: Entry
) -> None:
    """Minutes for each: the shipped settings, the real digits as reference, the true trigger."""
    bucket = s3_environment.bucket()
    settings = settings_for(entry, place).model_copy(
        update={"store": f"s3://{bucket}/store", "tracking_uri": f"sqlite:///{place}/registry/mlflow.db"}
    )
    put(ZOO / entry.folder, f"s3://{bucket}/models/{entry.folder}/")
    uri = registered(settings, f"s3://{bucket}/models/{entry.folder}/", entry.name)
    flags = ["--store", settings.store, "--tracking-uri", settings.tracking_uri, "--device", "cpu"]
    for name in ("reference", "known_trigger"):
        flags += ["--set", f"evaluation.{name}={getattr(settings.evaluation, name)}"]
    run = diffdefend(
        "run", uri, "--docker", "-o", "json", *flags, environment=environment_of(s3_environment), place=place
    )
    assert run.returncode == int(entry.backdoor.exists()), run.stderr
    result = json.loads(run.stdout)
    wanted = ("backdoored", "repaired") if entry.backdoor.exists() else ("clean", "promoted")
    assert (result["word"], result["outcome"]) == wanted
    assert_locked_down(watch, BACKDOORED if entry.backdoor.exists() else CLEAN)
    assert b"<html" in folders.read_file(result["gate_uri"], "report.html")
