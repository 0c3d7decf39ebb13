"""The fuzzer finds what it looks for, and a few hundred of its cases pass here; `make fuzz` runs all of them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks import fuzz_loading
from benchmarks.fuzz_loading import reference_says, run_case, summary
from diffdefend_core.loading import build, static

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(pristine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    shutil.copytree(pristine_model, base / "ddpm")
    return base


def test_a_few_cases_are_accepted_or_refused(models: Path) -> None:
    rows = [run_case(models, 1, number) for number in range(120)]
    found = summary(rows, 1)
    assert found["failures"] == [] and set(found["outcomes"]) == {"accepted", "refused"}
    assert found["different_refusals"] > 30


def test_a_case_is_the_same_each_time(models: Path) -> None:
    first, again = ({k: v for k, v in run_case(models, 1, 7).items() if k in ("kinds", "outcome")} for _ in range(2))
    assert first == again


def test_another_exception_is_a_crash(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(build, "load_denoiser", fail)
    row = run_case(models, 1, 0)
    assert row["outcome"] == "crash" and summary([row], 1)["failures"] == [row]


def test_work_without_end_is_a_hang(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(build, "load_denoiser", spin)
    monkeypatch.setattr(fuzz_loading, "SECONDS", 0.2)
    previous = signal.signal(signal.SIGPROF, fuzz_loading._interrupt)
    try:
        assert run_case(models, 1, 0)["outcome"] == "hang"
    finally:
        signal.signal(signal.SIGPROF, previous)


def test_memory_beyond_the_limit_is_a_failure(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_loading, "SPARE", -(10**9))
    assert run_case(models, 1, 0)["outcome"] == "memory"


def test_a_header_that_safetensors_rejects_is_a_failure(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = static.inspect_folder(model_folder)
    monkeypatch.setattr(static, "inspect_folder", lambda _: found)
    assert reference_says(model_folder) == ""
    content = (model_folder / WEIGHTS).read_bytes()
    (model_folder / WEIGHTS).write_bytes(content + b"\0")
    assert "SafetensorError" in reference_says(model_folder)


def test_a_configuration_that_diffusers_reads_differently_is_a_failure(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = static.inspect_folder(model_folder)
    monkeypatch.setattr(static, "inspect_folder", lambda _: found)
    config = model_folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 2}))
    assert "layers_per_block is 1, for diffusers 2" in reference_says(model_folder)
