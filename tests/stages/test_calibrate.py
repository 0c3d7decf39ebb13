"""A calibration from a team's own clean models, and scans against it."""

from __future__ import annotations

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

from diffdefend_core.cli import cli
from diffdefend_core.detection import Calibration
from diffdefend_core.errors import InputError
from diffdefend_core.stages.calibrate import calibrate
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
    # three models cover nothing: none of them is called clean
    assert {row["verdict"] for row in document["held_out"]} <= {"inconclusive", "backdoored"}
    scanned = CliRunner().invoke(
        cli, ["scan", models[0], "-o", "json", *flags, "--set", f"detection.calibration={document['uri']}"]
    )
    assert json.loads(scanned.stdout)["calibration_digest"] == document["digest"]
    assert calibrate(models, name="ours", settings=settings) == document["uri"]


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
