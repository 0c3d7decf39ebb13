"""Pickles through the load stage: refused by default, behind the flag converted, and said so wherever it matters."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import sample_records as sample
import torch
from safetensors.torch import load_file

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Outcome, Word
from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.io import registry
from diffdefend_core.io.folders import read_manifest
from diffdefend_core.options import GateOptions
from diffdefend_core.report.bundle import ReportBundle
from diffdefend_core.report.html import render_html
from diffdefend_core.report.scan_document import scan_document
from diffdefend_core.stages import announce
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.inspect_model import inspect_model
from diffdefend_core.stages.load import load

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"


@pytest.fixture
def pickled(model_folder: Path) -> Path:
    torch.save(load_file(model_folder / WEIGHTS), model_folder / PICKLE)
    (model_folder / WEIGHTS).unlink()
    return model_folder


def settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings(store=f"file://{tmp_path}/store", **changes)


def test_it_is_refused_by_default_and_converted_behind_the_flag(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRejectedError, match=r"is a pickle.*--allow-pickles"):
        load(str(pickled), settings=settings(tmp_path))
    uri = load(str(pickled), settings=settings(tmp_path, allow_pickles=True))
    model, manifest = read_record(ModelRef, uri, "model_ref"), read_manifest(uri)
    assert manifest is not None and f"model/{WEIGHTS}" in {file.path for file in manifest.files}
    assert not any(file.path.endswith(".bin") for file in manifest.files)
    sha256 = hashlib.sha256((pickled / PICKLE).read_bytes()).hexdigest()
    assert [(file.path, file.sha256) for file in model.pickles] == [(PICKLE, sha256)]
    assert "the weights came from a pickle" in model.findings[0] and sha256 in model.findings[0]
    assert load(str(pickled), settings=settings(tmp_path, allow_pickles=True)) == uri
    assert (pickled / PICKLE).exists()  # what the user has is left as it is


def test_inspect_says_what_load_would_do(pickled: Path, tmp_path: Path) -> None:
    refused = inspect_model(str(pickled), settings=settings(tmp_path))
    assert not refused["accepted"] and "picklescan found nothing" in refused["findings"][0]
    accepted = inspect_model(str(pickled), settings=settings(tmp_path, allow_pickles=True))
    assert accepted["accepted"] and accepted["family"] == "ddpm"
    assert {file["path"] for file in accepted["files"]} >= {PICKLE} and all(f["sha256"] for f in accepted["files"])


def test_the_flag_of_the_command_is_the_setting(
    pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["load", "--source", str(pickled), "--store", f"file://{tmp_path}/store"]
    assert run_command(command) == 2 and "is a pickle" in capsys.readouterr().err
    assert run_command([*command, "--allow-pickles"]) == 0


def test_the_permissions_are_no_science(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings()
    monkeypatch.setenv("DIFFDEFEND_ALLOW_PICKLES", "true")
    assert load_settings().allow_pickles and not before.allow_pickles
    assert load_settings().digest() == before.digest()


def test_the_finding_is_in_the_verdict_the_report_and_the_document() -> None:
    finding = "the weights came from a pickle, a.bin"
    model, verdict = sample.model_ref(findings=(finding,)), sample.verdict(Word.CLEAN, findings=(finding,))
    html = render_html(ReportBundle(model=model, trigger=sample.trigger(), verdict=verdict, options=GateOptions()))
    assert html.count(finding) == 2
    assert scan_document(model, verdict, uris={}, config_digest="", seconds=1.0)["findings"] == [finding]


def test_a_version_that_holds_pickles_is_not_promoted_but_what_it_was_converted_to_is(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry.register_source(uri, "faces", "s3://team/faces/", {registry.DIGEST_TAG: "a" * 64})
    registry.move_alias(uri, "faces", "champion", "1")
    model = sample.model_ref("faces", registered_name="faces", registered_version="1")
    decision = GateDecision(
        outcome=Outcome.PROMOTED, model_name="faces", model_digest=model.digest, policy_digest="p", rules=()
    )
    case = announce.Case(
        key="k", run_id="r", candidate_uri="s3://store/keep/1/", model=replace(model, pickles=model.files),
        verdict=sample.verdict(Word.CLEAN), candidate=_candidate(), decision=decision, options=GateOptions(),
    )  # fmt: skip
    told = announce.prepare(uri, case)
    announce.finish(uri, case, told, "s3://store/register/1/report.html", {})
    assert registry.alias_holder(uri, "faces", "champion") == "2"
    assert registry.resolve(uri, "models:/faces/2").source_uri == "s3://store/load/1/model/"
    assert registry.tags_of(uri, "faces", "1")["diffdefend.outcome"] == "quarantined"


def _candidate() -> Candidate:
    return Candidate(action="keep", model_uri="s3://store/load/1/", trigger_uri="t", verdict_uri="v")
