"""The stages that open a model know nothing of the registry, and no secret is in anything that a run leaves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny_scan import calibration_for, flags_of, tiny_settings

from diffdefend_core.artifacts import Verdict
from diffdefend_core.cli import run_command
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.load import load
from tests.s3_server import rclone_program, serving

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-store",
    "MLFLOW_TRACKING_USERNAME": "gate",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-registry",
    "HF_TOKEN": "canary-of-the-hub",
}
WORD = "canary"


def test_load_invert_and_detect_run_without_registry_and_credentials(
    pristine_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "AWS_", "HF_")):
            monkeypatch.delenv(name)
    for name in ("mlflow", "minio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them fails
    settings = tiny_settings(tmp_path, calibration_for(tmp_path / "clean", "clean"), tracking_uri="http://127.0.0.1:9")
    model = load(str(pristine_model), settings=settings)
    trigger = invert_trigger(model, settings=settings)
    assert read_record(Verdict, detect(model, trigger, settings=settings), "verdict").word == "clean"


@pytest.mark.s3
def test_no_secret_is_in_anything_that_a_run_says_or_leaves(
    pristine_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if rclone_program() is None:
        pytest.skip("no rclone")
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    calibration = calibration_for(tmp_path / "clean", "clean")
    with serving(tmp_path / "s3", "key", CANARIES["AWS_SECRET_ACCESS_KEY"]) as server:
        monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", server.endpoint)
        settings = tiny_settings(tmp_path, calibration, store=f"s3://{server.bucket()}/store")
        uris = _run_all(str(pristine_model), flags_of(settings), capfd)
        _fail_in_all_ways(uris, flags_of(settings), monkeypatch)
    said = capfd.readouterr()
    assert "Traceback" in said.err and "unexpected" not in said.err
    assert WORD not in said.out + said.err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "manifest.json", "mlflow.db"} <= {path.name for path in left}
    assert [path for path in left if WORD.encode() in path.read_bytes()] == []


def _run_all(source: str, flags: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run every stage by its command, as verbose as can be; return the URIs."""

    def stage(*command: str) -> str:
        code = run_command([*command, *flags, "--verbose"])
        said = capfd.readouterr()
        assert code == 0 and WORD not in said.out + said.err, said.err
        return said.out.strip()

    uris = {"model": stage("load", "--source", source)}
    uris["trigger"] = stage("invert-trigger", "--model", uris["model"])
    scanned = ("--model", uris["model"], "--trigger", uris["trigger"])
    uris["verdict"] = stage("detect", *scanned)
    uris["candidate"] = stage("keep", *scanned, "--verdict", uris["verdict"])
    uris["scorecard"] = stage("evaluate", "--candidate", uris["candidate"])
    stage("register", "--candidate", uris["candidate"], "--scorecard", uris["scorecard"])
    return uris


def _fail_in_all_ways(uris: dict[str, str], flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals by the store and by a registry that is not there, each with a traceback."""
    register = ["register", "--candidate", uris["candidate"], "--scorecard", uris["scorecard"], *flags, "--verbose"]
    for tracking_uri in ("http://user:canary-in-the-uri@127.0.0.1:9", "https://127.0.0.1:9"):
        assert run_command([*register, "--tracking-uri", tracking_uri]) == 2
    assert run_command(["load", "--source", "s3://no-such-bucket/x/", *flags, "--verbose"]) == 2
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-that-is-wrong")
        assert run_command(["load", "--source", uris["model"], *flags, "--verbose"]) == 2
        patch.setenv("DIFFDEFEND_S3_ENDPOINT", "https://user:canary@127.0.0.1:9")
        assert run_command(["load", "--source", uris["model"], *flags, "--verbose"]) == 2
