"""What the containers of a local run are given; that they get it is shown with a daemon (test_local_docker)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from kfp.local import docker_task_handler, task_dispatcher

from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import InputError
from diffdefend_core.io import registry
from pipelines import containers
from pipelines.stage_environment import for_stage, of_containers

STAGES = ("load", "invert-trigger", "detect", "keep", "purify", "quarantine", "evaluate", "register")


@pytest.fixture(autouse=True)
def _a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(containers, "_check_docker", lambda _docker: None)
    monkeypatch.setenv("DIFFDEFEND_DOCKER_NETWORK", "host")
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def settings_with(**groups: Any) -> Settings:
    return containers.inside(load_settings(store="s3://b/store", tracking_uri="http://mlflow", **groups))


def seen(source: str, settings: Settings) -> dict[str, dict[Path, bool]]:
    """Return the paths that each stage sees, and whether it may write them."""
    folders = containers.runner(source, settings).container_run_args["mounts"]
    return {
        stage: {item.path: item.writable for item in folders if not item.stages or stage in item.stages}
        for stage in STAGES
    }


def test_a_reference_in_a_local_folder_is_seen_by_the_stages_that_compute(tmp_path: Path) -> None:
    for name in ("model", "images", "trusted"):
        (tmp_path / name).mkdir()
    settings = settings_with(evaluation={"reference": "./images"}, inversion={"reference": "trusted"})
    assert settings.evaluation.reference == (tmp_path / "images").as_uri()
    found = seen("./model", settings)
    assert found["load"] == {tmp_path / "model": False}
    assert found["evaluate"] == found["purify"] == {tmp_path / "images": False, tmp_path / "trusted": False}
    assert found["keep"] == found["register"] == {}


def test_a_folder_that_is_model_and_reference_is_seen_by_both(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    found = seen("./model", settings_with(inversion={"reference": "./model"}))
    assert found["load"] == found["detect"] == {tmp_path / "model": False} and found["keep"] == {}


def test_words_are_no_paths(tmp_path: Path) -> None:
    for name in ("self", "shipped"):
        (tmp_path / name).mkdir()
    settings = settings_with()
    assert (settings.evaluation.reference, settings.detection.calibration) == ("self", "shipped")
    assert set(map(str, seen("s3://b/model/", settings).values())) == {"{}"}


def test_a_registered_version_is_seen_where_its_source_lies(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    uri = f"sqlite:///{tmp_path}/registry/mlflow.db"
    registry.register_source(uri, "digits", (tmp_path / "model").as_uri(), {})
    for path in (tmp_path / "registry", *(tmp_path / "registry").rglob("*")):
        os.chown(path, *containers.user())
    given = load_settings(store="s3://b/store", tracking_uri=uri, inversion={"reference": "models:/digits/1"})
    settings = containers.inside(given)
    assert settings.inversion.reference == (tmp_path / "model").as_uri()
    found = seen("models:/digits/1", settings)
    assert found["load"] == {tmp_path / "model": False, tmp_path / "registry": True}
    assert found["detect"] == {tmp_path / "model": False} and found["register"] == {tmp_path / "registry": True}


def test_the_store_is_made_for_the_user_of_the_containers_who_is_never_root(tmp_path: Path) -> None:
    settings = load_settings(store=f"file://{tmp_path}/a/store", tracking_uri="http://mlflow")
    found = seen("s3://b/model/", settings)
    assert all(folders == {tmp_path / "a" / "store": True} for folders in found.values())
    number, _ = containers.user()
    assert number and (tmp_path / "a" / "store").stat().st_uid == number


@pytest.mark.skipif(os.getuid() != 0, reason="only root meets folders that its containers may not write")
def test_root_is_told_of_a_store_that_containers_may_not_write(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    settings = load_settings(store=f"file://{tmp_path}/store", tracking_uri="http://mlflow")
    with pytest.raises(InputError, match=r"belongs to user 0.*chown -R 10001:10001 "):
        containers.runner("s3://b/model/", settings)


@pytest.mark.parametrize("name", ["DIFFDEFEND_S3_ENDPOINT", "AWS_ENDPOINT_URL"])
def test_an_address_of_this_machine_alone_is_refused_on_a_network_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFDEFEND_S3_ENDPOINT", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9000")
    containers.runner("s3://b/model/", settings_with())
    monkeypatch.setenv("DIFFDEFEND_DOCKER_NETWORK", "bridge")
    with pytest.raises(InputError, match=f"{name} names 127.0.0.1.*DIFFDEFEND_DOCKER_NETWORK=host"):
        containers.runner("s3://b/model/", settings_with())


def test_each_secret_goes_to_its_stages_and_what_is_not_known_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": set(STAGES), "MLFLOW_TRACKING_PASSWORD": {"load", "register"}, "HF_TOKEN": {"load"},
        "DIFFDEFEND_SIGNING_KEY": {"register"}, "DIFFDEFEND_KFP_TOKEN": set(), "DIFFDEFEND_WEBHOOK_SECRET": set(),
        "SOME_OTHER_TOKEN": set(), "DIFFDEFEND_DB_PASSWORD": set(),
    }  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "canary")
    given = of_containers(load_settings(store="s3://b/store", tracking_uri="https://user:canary@mlflow"))
    for name, stages in secrets.items():
        assert {stage for stage in STAGES if name in for_stage(stage, given)} == stages, name
    assert for_stage("load", given)["DIFFDEFEND_TRACKING_URI"] == "https://user:canary@mlflow"
    assert for_stage("detect", given)["DIFFDEFEND_TRACKING_URI"] == "https://mlflow"


def test_the_hub_is_switched_on_in_containers_only_if_the_network_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images switch it off."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for allowed, word in ((False, "1"), (True, "0")):
        given = load_settings(store="s3://b/s", tracking_uri="http://mlflow", allow_network=allowed)
        assert of_containers(given)["HF_HUB_OFFLINE"] == word


def test_kfp_still_has_the_handler_that_is_replaced() -> None:
    """If this fails, read kfp/local/docker_task_handler.py of the new version before raising the pin."""
    assert task_dispatcher.docker_task_handler is docker_task_handler
    kept = docker_task_handler.DockerTaskHandler("image", ["python3"], "/root", object(), {"A": "b"})
    assert (kept.image, kept.full_command, kept.env_vars) == ("image", ["python3"], {"A": "b"})
    assert kept.get_volumes_to_mount()["/root"] == {"bind": "/root", "mode": "rw"}
    _, environment = task_dispatcher._prepare_runner_and_env_vars(
        containers.runner("s3://b/model/", settings_with()), {"A": "b"}
    )
    assert environment["A"] == "b" and environment["DIFFDEFEND_TRACKING_URI"] == "http://mlflow"
