"""The gate as a user runs it: kfp.local, real stages in processes of their own, a tiny real model, a real registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server
from tiny_scan import calibration_for, flags_of, repairing_flags, tiny_settings

from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.io import folders, registry
from diffdefend_core.io.store import open_store
from pipelines.local import run_gate

ROOT = Path(__file__).parents[2]
NAME = "team-faces"


@pytest.fixture(autouse=True)
def _a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


@pytest.fixture(scope="session")
def registry_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def clean_settings(tmp_path: Path, registry_uri: str) -> Settings:
    return tiny_settings(tmp_path, calibration_for(tmp_path / "clean", "clean"), tracking_uri=registry_uri)


@pytest.fixture(scope="session")
def repairing(tmp_path_factory: pytest.TempPathFactory, pristine_model: Path) -> dict[str, Any]:
    """Flags under which the tiny model is backdoored and its repaired version clean."""
    return repairing_flags(tmp_path_factory.mktemp("repairing"), pristine_model)


@pytest.fixture
def repairing_settings(tmp_path: Path, registry_uri: str, repairing: dict[str, Any]) -> Settings:
    return tiny_settings(tmp_path, tracking_uri=registry_uri, **repairing)


def registered(settings: Settings, source: str, name: str) -> str:
    """Register the model as a team would, as its champion; return the `models:/` URI."""
    registry.register_source(settings.tracking_uri, name, source, {registry.DIGEST_TAG: "unknown"})
    registry.move_alias(settings.tracking_uri, name, "champion", "1")
    return f"models:/{name}/1"


def run_of(settings: Settings, result: dict[str, Any]) -> tuple[Any, set[str]]:
    """Return the MLflow run of a gate's decision and the paths of its artifacts."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    decision = json.loads(folders.read_file(result["gate_uri"], "gate_decision.json"))
    found = client.get_run(decision["run_id"])
    paths, todo = set(), [""]
    while todo:
        for item in client.list_artifacts(found.info.run_id, todo.pop()):
            todo += [item.path] if item.is_dir else []
            paths |= set() if item.is_dir else {item.path}
    return found, paths


def assert_logged(settings: Settings, result: dict[str, Any], *, repaired: bool) -> None:
    run, paths = run_of(settings, result)
    assert run.info.status == "FINISHED"
    assert run.data.tags["diffdefend.outcome"] == result["outcome"]
    assert run.data.tags["diffdefend.verdict"] == result["word"]
    wanted = {"probability", "forward_equivalents", "fid_before", "kid_before", "z.parity", "z.uniformity"}
    wanted |= {"fid_after", "asr_before", "asr_after"} if repaired else set()
    assert wanted <= run.data.metrics.keys()
    assert run.data.params["config_digest"] == settings.digest()
    pictures = {"trigger", "detect_triggered", "detect_plain", "evaluate_plain_before"}
    pictures |= {"evaluate_plain_after", "evaluate_triggered_before"} if repaired else set()
    assert {"report.html", "report.json", *(f"pictures/{name}.png" for name in pictures)} <= paths
    records = {"model_ref", "inverted_trigger", "verdict", "candidate", "scorecard", "gate_decision"}
    assert {f"records/{name}.json" for name in records} <= paths


@pytest.mark.s3
def test_a_clean_model_in_a_folder_is_promoted_with_a_store_in_s3(
    clean_settings: Settings, model_folder: Path, s3_environment: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, with `-o json`: stdout is the result and nothing else."""
    bucket = s3_environment.bucket()
    settings = clean_settings.model_copy(update={"store": f"s3://{bucket}/store"})
    assert run_command(["run", str(model_folder), "--name", "tiny-clean", "-o", "json", *flags_of(settings)]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["word"], result["outcome"]) == ("clean", "promoted") and "Traceback" not in err
    found = registry.resolve(settings.tracking_uri, "models:/tiny-clean@champion")
    assert found.version == "1" and found.source_uri.startswith(f"s3://{bucket}/store/load/")
    tags = registry.tags_of(settings.tracking_uri, "tiny-clean", "1")
    assert tags["diffdefend.outcome"] == "promoted"
    assert tags["diffdefend.report"] == f"{result['gate_uri']}report.html"
    assert_finished(s3_environment, bucket, {"load", "invert_trigger", "detect", "keep", "evaluate", "register"})
    assert_logged(settings, result, repaired=False)


def assert_finished(server: S3Server, bucket: str, stages: set[str]) -> None:
    """One finished folder of each stage lies in the store, and nothing else."""
    keys = [str(item.object_name) for item in server.client.list_objects(bucket, "store/", recursive=True)]
    made = {"/".join(key.split("/")[:3]) for key in keys}
    assert sorted(folder.split("/")[1] for folder in made) == sorted(stages)
    assert all(f"{folder}/manifest.json" in keys for folder in made)


def test_a_backdoored_version_loses_its_alias_and_its_repaired_one_is_the_challenger(
    repairing_settings: Settings, model_folder: Path
) -> None:
    uri = repairing_settings.tracking_uri
    result = run_gate(registered(repairing_settings, model_folder.as_uri(), NAME), repairing_settings, quiet=True)
    assert (result["word"], result["outcome"]) == ("backdoored", "repaired")
    assert registry.aliases_of(uri, NAME, "1") == () and registry.aliases_of(uri, NAME, "2") == ("challenger",)
    first, second = (registry.tags_of(uri, NAME, version) for version in ("1", "2"))
    assert (first["diffdefend.outcome"], first["diffdefend.verdict"]) == ("quarantined", "backdoored")
    assert (second["diffdefend.outcome"], second["diffdefend.verdict"]) == ("repaired", "clean")
    assert (second["diffdefend.parent_name"], second["diffdefend.parent_version"]) == (NAME, "1")
    source = registry.resolve(uri, f"models:/{NAME}@challenger").source_uri
    assert source == f"{result['candidate_uri']}model/"
    assert_logged(repairing_settings, result, repaired=True)


@pytest.mark.slow
@pytest.mark.s3
def test_a_clean_registered_version_in_s3_stays_the_champion(
    clean_settings: Settings, model_folder: Path, s3_environment: S3Server
) -> None:
    source, uri = f"s3://{s3_environment.bucket()}/in/tiny/", clean_settings.tracking_uri
    store, prefix = open_store(source)
    for path in model_folder.rglob("*"):
        if path.is_file():
            store.put(prefix + path.relative_to(model_folder).as_posix(), path)
    result = run_gate(registered(clean_settings, source, "all-well"), clean_settings, quiet=True)
    assert (result["word"], result["outcome"]) == ("clean", "promoted")
    assert registry.aliases_of(uri, "all-well", "1") == ("champion",)
    assert registry.tags_of(uri, "all-well", "1")["diffdefend.outcome"] == "promoted"


@pytest.mark.slow
def test_a_backdoored_model_in_a_folder_exits_1(
    repairing_settings: Settings, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags_of(repairing_settings), "--set", 'gate.policy={"version": 1, "rules": []}']
    flags += ["--set", "detection.limit=0.1"]
    assert run_command(["run", str(model_folder), "--name", "from-folder", "--quiet", *flags]) == 1
    out, err = capfd.readouterr()
    assert err == ""
    assert "backdoored" in out and "v1 @challenger" in out and "report: file://" in out
    aliases = registry.aliases_of(repairing_settings.tracking_uri, "from-folder", "1")
    assert aliases == ("challenger",)
