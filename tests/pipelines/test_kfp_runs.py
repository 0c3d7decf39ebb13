"""Runs of a scan through the real kfp client, against a server that speaks its REST API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kfp
import pytest
from kfp_server import KfpServer, kfp_server
from s3_server import free_port

from diffdefend_core.cli import run_command
from diffdefend_core.config import load_settings
from diffdefend_core.errors import InputError
from diffdefend_core.stages.dispatch import Job
from pipelines.cluster import Cluster, ClusterError
from pipelines.kfp_runs import KfpRuns
from pipelines.placement import Placement

JOB = Job(name="faces", version="3")
SETTINGS = load_settings(store="s3://bucket/store", tracking_uri="http://mlflow:5000")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))
    with kfp_server() as state:
        yield state


def runs_on(server: KfpServer, namespace: str = "") -> KfpRuns:
    cluster = Cluster(host=server.url, experiment="e", namespace=namespace)
    return KfpRuns(cluster, SETTINGS, placement=Placement())


def test_a_version_is_one_run_that_a_restarted_scan_finds_again(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_on(server)
    first = runs.begin(JOB)
    assert runs.outcome(first) is None
    assert runs_on(server).begin(JOB) == first, "another controller takes it over"
    assert runs.begin(Job(name="faces", version="4")) != first
    parameters = server.run(first)["runtime_config"]["parameters"]
    assert (parameters["source"], parameters["store"]) == ("models:/faces/3", SETTINGS.store)
    assert parameters["settings"] == SETTINGS.science_json() and len(server.pipelines) == 1
    server.run(first)["state"] = "SUCCEEDED"
    assert runs.outcome(first) == ""
    second = runs.begin(JOB)
    assert second != first
    server.run(second).update(state="FAILED", error={"code": 13, "message": "no GPU"})
    assert str(runs.outcome(second)).endswith("ended as FAILED: no GPU")
    third = runs.begin(JOB)
    runs.stop(third)
    assert str(runs.outcome(third)).endswith("ended as CANCELED")
    assert capsys.readouterr().out == ""


def test_a_gate_in_a_profile_is_found_again(server: KfpServer) -> None:
    server.multi_user = True
    with pytest.raises(InputError, match="--namespace"):
        runs_on(server).prepare()
    for _ in range(2):
        runs_on(server, "team-a").prepare()
    assert [item["namespace"] for item in server.pipelines] == ["team-a"]


def test_what_cannot_work_is_said_at_once() -> None:
    with pytest.raises(InputError, match="s3://"):
        KfpRuns(Cluster(host="http://host", experiment="e"), load_settings(), placement=Placement())
    nowhere = Cluster(host="http://127.0.0.1:9", experiment="e")
    with pytest.raises(ClusterError, match="no answer"):
        KfpRuns(nowhere, SETTINGS, placement=Placement()).outcome("r1")


def test_the_scan_logs_in_as_submit_does_and_says_so_before_the_first_version(
    server: KfpServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.token = "not-for-any-log"
    command = ["scan-registry", "--kfp", server.url, "--store", "s3://bucket/store", "--only", "none"]
    assert run_command(command) == 2
    assert "answered 401" in capfd.readouterr().err
    assert run_command([*command, "--kfp", f"http://127.0.0.1:{free_port()}"]) == 2
    err = capfd.readouterr().err
    assert "no answer" in err and err.count("\n") == 1
    assert run_command([*command, "--memory", "lots"]) == 2
    assert "memory" in capfd.readouterr().err
    monkeypatch.setenv("DIFFDEFEND_KFP_TOKEN", server.token)
    assert run_command([*command, "--require-digests"]) == 2
    assert "images without a digest" in capfd.readouterr().err and server.pipelines == []
