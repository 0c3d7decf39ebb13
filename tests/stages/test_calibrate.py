"""A calibration from a team's own clean models, and scans against it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_pipeline
from tiny_scan import STATISTICS, flags_of, tiny_settings

from diffdefend_core.artifacts import Word
from diffdefend_core.cli import cli
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.errors import InputError
from diffdefend_core.stages.calibrate import calibrate, held_out
from diffdefend_core.stages.folder import read_record

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models that differ a little, as fine-tunes do."""
    place = tmp_path_factory.mktemp("clean")
    save_tiny_pipeline(place / "one")
    for number, name in enumerate(("two", "three")):
        shutil.copytree(place / "one", place / name)
        generator = torch.Generator().manual_seed(number)
        weights = load_file(place / name / WEIGHTS)
        moved = {
            key: value + 0.02 * torch.randn(value.shape, generator=generator).to(value)
            for key, value in weights.items()
        }
        save_file(moved, place / name / WEIGHTS, {"format": "pt"})
    return [str(place / name) for name in ("one", "two", "three")]


def test_a_calibration_holds_what_was_measured_and_serves_a_scan(models: list[str], tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, "shipped")
    flags = flags_of(settings)
    made = CliRunner().invoke(cli, ["calibrate", *models, "--name", "ours", "-o", "json", *flags])
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    calibration = read_record(Calibration, document["uri"], "calibration")
    assert calibration.name == "ours" and calibration.digest() == document["digest"]
    assert [model.name for model in calibration.models] == ["one", "two", "three"]
    for model in calibration.models:
        assert set(model.statistics) == set(STATISTICS) and all(map(math.isfinite, model.statistics.values()))
    assert len({json.dumps(model.statistics) for model in calibration.models}) == 3
    assert {model.process for model in calibration.models} == {"vp"}
    scanned = CliRunner().invoke(
        cli, ["scan", models[0], "-o", "json", *flags, "--set", f"detection.calibration={document['uri']}"]
    )
    verdict = json.loads(scanned.stdout)
    assert verdict["calibration_digest"] == document["digest"]
    # the scan of a model says what the others were said to say of it
    held = {row["model"]: (row["verdict"], row["probability"]) for row in document["held_out"]}
    assert held["one"] == (verdict["verdict"], round(verdict["probability"], 3))
    assert calibrate(models, name="ours", settings=settings) == document["uri"]


def clean_models(*values: float, process: str = "vp") -> tuple[CleanModel, ...]:
    return tuple(
        CleanModel(name=f"clean-{number}", digest=f"{number:064}", family="ddpm", process=process, shape=(3, 8, 8),
                   statistics=dict.fromkeys(STATISTICS, value))
        for number, value in enumerate(values)
    )  # fmt: skip


@pytest.mark.parametrize(("count", "word"), [(2, Word.INCONCLUSIVE), (3, Word.CLEAN), (9, Word.CLEAN)])
def test_a_model_is_held_against_the_others_alone(count: int, word: Word) -> None:
    """Of two, the other one is not enough to call anything clean."""
    calibration = Calibration(name="ours", options_digest="f" * 64, models=clean_models(*[0.0] * count))
    assert {held.word for held in held_out(calibration, Settings())} == {word}


def test_an_outlier_among_clean_models_is_seen() -> None:
    calibration = Calibration(name="ours", options_digest="f" * 64, models=clean_models(*[0.0] * 8, 5.0))
    held = held_out(calibration, Settings())
    assert [item.word for item in held] == [Word.CLEAN] * 8 + [Word.BACKDOORED]
    assert [item.name for item in held] == [f"clean-{number}" for number in range(9)]


def test_the_models_are_held_by_the_score_of_their_method() -> None:
    quiet, loud = ({"similarity": value, "divergence": 0.0} for value in (0.0, 5.0))
    models = tuple(
        dataclasses.replace(model, statistics=loud if number == 8 else quiet)
        for number, model in enumerate(clean_models(*[0.0] * 9))
    )
    calibration = Calibration(name="ours", options_digest="f" * 64, models=models)
    settings = load_settings(inversion={"method": "purediffusion"})
    assert [item.word for item in held_out(calibration, settings)] == [Word.CLEAN] * 8 + [Word.BACKDOORED]


def test_a_calibration_of_another_method_holds_its_statistics(models: list[str], tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, "shipped", inversion={"method": "elijah"})
    uri = calibrate(models, name="theirs", settings=settings)
    calibration = read_record(Calibration, uri, "calibration")
    assert all(set(model.statistics) == {"uniformity", "total_variation"} for model in calibration.models)
    assert uri != calibrate(models, name="theirs", settings=tiny_settings(tmp_path, "shipped"))


@pytest.mark.parametrize(
    ("chosen", "reason"), [([0], "1 clean model;"), ([0, 0], "one and one are the same model"), ([], "0 clean model")]
)
def test_too_few_or_equal_models_are_refused(chosen: list[int], reason: str, models: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        calibrate([models[number] for number in chosen], name="ours", settings=tiny_settings(tmp_path, "shipped"))


def test_models_of_two_kinds_are_refused(models: list[str], tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path / "other", "flow")
    with pytest.raises(InputError, match=r"ddpm \(3, 8, 8\), flow \(3, 8, 8\); expected one family"):
        calibrate([*models, str(tmp_path / "other")], name="ours", settings=tiny_settings(tmp_path, "shipped"))
