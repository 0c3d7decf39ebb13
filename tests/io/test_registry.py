"""The registry port against a real MLflow on sqlite."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffdefend_core.errors import InputError, RegistryError
from diffdefend_core.io import registry, tracking

TAGS = {registry.DIGEST_TAG: "d0", "diffdefend.verdict": "clean"}


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the session: setting it up takes seconds. Each test uses a model name of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder / 'fresh' / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def nothing_falls_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def test_a_version_is_registered_by_reference_and_resolved(uri: str) -> None:
    version = registry.register_source(uri, "alpha", "s3://bucket/model/", TAGS)
    found = registry.resolve(uri, f"models:/alpha/{version}")
    assert found == registry.Resolved(source_uri="s3://bucket/model/", name="alpha", version="1")
    assert registry.tags_of(uri, "alpha", version) == TAGS


def test_registering_twice_is_one_version_but_other_bytes_are_another(uri: str) -> None:
    first = registry.register_source(uri, "beta", "s3://bucket/model/", TAGS)
    assert registry.register_source(uri, "beta", "s3://bucket/model", TAGS) == first
    assert registry.register_source(uri, "beta", "s3://bucket/model/", {**TAGS, registry.DIGEST_TAG: "d1"}) != first


def test_two_that_register_at_once_leave_one_version(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look before either has registered: the look at a registry and the write are two calls."""
    looked, first_of, looks = threading.Barrier(2, timeout=60), registry._first_of, threading.local()

    def wait_for_the_other(*arguments: Any) -> str | None:
        found = first_of(*arguments)
        if not getattr(looks, "done", False):
            looks.done = True
            looked.wait()
        return found

    registry.register_source(uri, "twice", "s3://bucket/other/", {**TAGS, registry.DIGEST_TAG: "other"})
    monkeypatch.setattr(registry, "_first_of", wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: registry.register_source(uri, "twice", "s3://bucket/model/", TAGS), range(2)))
    left = tracking.connect(uri).search_model_versions("name='twice'")
    assert made[0] == made[1] and sorted(int(version.version) for version in left) == [1, 2]


def test_a_digest_tag_on_another_source_is_not_trusted(uri: str) -> None:
    planted = registry.register_source(uri, "gamma", "s3://elsewhere/model/", TAGS)
    assert registry.register_source(uri, "gamma", "s3://bucket/model/", TAGS) != planted


def test_aliases_move_and_are_dropped_only_from_the_version_named(uri: str) -> None:
    first = registry.register_source(uri, "delta", "s3://bucket/1/", TAGS)
    second = registry.register_source(uri, "delta", "s3://bucket/2/", TAGS)
    registry.move_alias(uri, "delta", "champion", first)
    registry.move_alias(uri, "delta", "champion", second)
    assert registry.resolve(uri, "models:/delta@champion").version == second
    assert registry.aliases_of(uri, "delta", first) == ()
    assert registry.aliases_of(uri, "delta", second) == ("champion",)
    assert not registry.drop_alias(uri, "delta", "champion", first)
    assert registry.drop_alias(uri, "delta", "champion", second)
    assert registry.alias_holder(uri, "delta", "champion") is None


def test_marks_are_set_and_overwritten(uri: str) -> None:
    version = registry.register_source(uri, "epsilon", "s3://bucket/model/", TAGS)
    registry.mark(uri, "epsilon", version, {"diffdefend.verdict": "backdoored"})
    assert registry.tags_of(uri, "epsilon", version)["diffdefend.verdict"] == "backdoored"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("models:/nobody/1", "version 1 of the model 'nobody'"),
        ("models:/nobody@champion", "the model 'nobody'"),
        ("models:/zeta/99", "version 99 of the model 'zeta'"),
        ("models:/zeta@nothing", "the alias 'nothing'"),
    ],
)
def test_what_is_not_there_is_one_clear_line(uri: str, named: str, said: str) -> None:
    registry.register_source(uri, "zeta", "s3://bucket/model/", TAGS)
    with pytest.raises(RegistryError, match=said) as caught:
        registry.resolve(uri, named)
    assert "\n" not in str(caught.value)
    assert "is not in the registry" in str(caught.value)


@pytest.mark.parametrize("wrong", ["models:/a", "models:/a/b", "models:/a/1/2", "runs:/x", "models:/a@b@c", ""])
def test_another_form_of_uri_is_refused(uri: str, wrong: str) -> None:
    with pytest.raises(InputError, match="model URI"):
        registry.resolve(uri, wrong)


@pytest.mark.parametrize("wrong", ["", " a", "a/b", "a:b", "a'b", "a@b", "a\nb", ".."])
def test_a_name_that_would_not_work_is_refused(uri: str, wrong: str) -> None:
    with pytest.raises(InputError, match="registered model"):
        registry.register_source(uri, wrong, "s3://bucket/model/", TAGS)


def test_a_server_that_does_not_answer_is_given_up_without_telling_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    start = time.monotonic()
    with pytest.raises(RegistryError) as caught:
        registry.resolve("http://user:hunter2@127.0.0.1:9", "models:/a/1")
    assert time.monotonic() - start < 30
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_database_that_is_none_is_a_registry_error(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryError):
        registry.resolve(f"sqlite:///{tmp_path / 'broken.db'}", "models:/a/1")


def test_a_run_holds_what_was_logged_and_leaves_out_what_is_not_finite(uri: str) -> None:
    with tracking.open_run(uri, "gate", key="k1", name="alpha", tags={"diffdefend.outcome": "promoted"}) as run_id:
        tracking.log(
            uri,
            run_id,
            params={"gate.asr_after_max": 0.02},
            metrics={"fid_before": 3.0, "asr_after": float("nan"), "kid_after": float("inf")},
            files={"report.html": b"<p>", "records/verdict.json": b"{}"},
        )
    client = tracking.connect(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time is not None
    assert run.data.params == {"gate.asr_after_max": "0.02"}
    assert run.data.metrics == {"fid_before": 3.0}
    assert run.data.tags["diffdefend.outcome"] == "promoted"
    assert {item.path for item in client.list_artifacts(run_id)} == {"report.html", "records"}
    database = Path(uri.removeprefix("sqlite:///"))
    assert run.info.artifact_uri.startswith(database.parent.as_uri())


def test_the_same_decision_is_the_same_run_and_another_is_another(uri: str) -> None:
    runs = []
    for key in ("k2", "k2", "k3"):
        with tracking.open_run(uri, "gate", key=key, name="beta", tags={}) as run_id:
            tracking.log(uri, run_id, params={"a": 1}, metrics={}, files={})
            runs.append(run_id)
    assert runs[0] == runs[1] != runs[2]


def test_a_run_whose_body_fails_is_failed(uri: str) -> None:
    with pytest.raises(KeyError), tracking.open_run(uri, "gate", key="k4", name="gamma", tags={}) as run_id:
        raise KeyError
    assert tracking.connect(uri).get_run(run_id).info.status == "FAILED"


def test_a_given_run_is_used_and_left_running(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(uri)
    given = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with tracking.open_run(uri, "gate", key="k5", name="delta", tags={}) as run_id:
        tracking.log(uri, run_id, params={"a": 1}, metrics={}, files={})
        tracking.log(uri, run_id, params={"a": 1}, metrics={}, files={})
        with pytest.raises(RegistryError, match="MLFLOW_RUN_ID"):
            tracking.log(uri, run_id, params={"a": 2}, metrics={}, files={})
    assert run_id == given
    assert client.get_run(given).info.status == "RUNNING"


def test_a_given_run_that_is_not_there_is_a_registry_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(RegistryError), tracking.open_run(uri, "gate", key="k6", name="e", tags={}):
        pass


def test_a_given_run_of_another_server_is_left_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with tracking.open_run(uri, "gate", key="k7", name="e", tags={}) as run_id:
        assert run_id != "0" * 32
    assert tracking.connect(uri).get_run(run_id).info.status == "FINISHED"


def test_mlflow_says_nothing_and_writes_nothing_into_the_working_folder(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    code = (
        "import sys\n"
        "from diffdefend_core.io import registry, tracking\n"
        "assert 'mlflow' not in sys.modules\n"
        f"uri = 'sqlite:///{tmp_path}/db/mlflow.db'\n"
        "version = registry.register_source(uri, 'm', 's3://b/m/', {registry.DIGEST_TAG: 'd'})\n"
        "with tracking.open_run(uri, 'e', key='k', name='n', tags={}) as run:\n"
        "    tracking.log(uri, run, params={}, metrics={}, files={'a.txt': b'a'})\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MLFLOW")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=work, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(work.iterdir()) == []
