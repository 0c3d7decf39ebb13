"""The shipped calibrations: of the clean models of the zoo as they lie there, with the options that a scan uses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from diffdefend_core.artifacts import Word
from diffdefend_core.config import load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.detection.decide import NEEDED
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.loading.static import inspect_folder
from diffdefend_core.stages.calibrate import held_out
from diffdefend_core.stages.methods import METHODS, chosen
from zoo.build import HERE
from zoo.calibrate import TARGET, known_models, shows
from zoo.recipes import RECIPES, by_name

SHIPPED = Calibration.from_json((TARGET / "diffdefend.json").read_bytes())
IN_THE_REPOSITORY = [model for model in SHIPPED.models if by_name(model.name).shipped]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b'{"models": []}'])
def test_an_earlier_calibration_that_cannot_be_read_is_measured_anew(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "old.json").write_bytes(content)
    assert known_models(tmp_path / "old.json", SHIPPED.options_digest) == {}


def test_models_that_were_measured_with_the_same_options_are_kept() -> None:
    path = TARGET / "diffdefend.json"
    assert list(known_models(path, SHIPPED.options_digest).values()) == list(SHIPPED.models)
    assert known_models(path, "0" * 64) == {}


def test_the_calibrations_are_those_of_methods() -> None:
    assert {file.stem for file in TARGET.glob("*.json")} <= set(METHODS)


@pytest.mark.parametrize("method", sorted(file.stem for file in TARGET.glob("*.json")))
def test_each_was_measured_with_the_default_options_of_its_method(method: str) -> None:
    settings = load_settings(inversion={"method": method})
    calibration = Calibration.from_json((TARGET / f"{method}.json").read_bytes())
    assert calibration.options_digest == chosen(settings).digest(settings)
    shown = [model.name for model in SHIPPED.models if shows(method, model.family)]
    assert [model.name for model in calibration.models] == shown


def test_it_holds_every_clean_model_of_the_zoo_and_no_planted_one() -> None:
    clean = [recipe.name for recipe in RECIPES if recipe.attack is None]
    assert [model.name for model in SHIPPED.models] == clean
    assert len({model.digest for model in SHIPPED.models}) == len(SHIPPED.models)
    for model in SHIPPED.models:
        assert set(model.statistics) == set(NEEDED) and all(map(math.isfinite, model.statistics.values()))


@pytest.mark.parametrize("model", IN_THE_REPOSITORY, ids=lambda model: model.name)
def test_its_models_are_those_that_lie_in_the_zoo(model: CleanModel) -> None:
    inspection = inspect_folder(HERE / model.name)
    assert model.digest == content_digest(inspection.files)
    assert (model.family, model.shape) == (inspection.family, tuple(inspection.shape))
    assert model.process == load_denoiser(HERE / model.name).kind


def test_the_others_call_each_of_its_models_clean_where_they_are_enough() -> None:
    for model, held in zip(SHIPPED.models, held_out(SHIPPED, load_settings()), strict=True):
        kin, _ = SHIPPED.without(model.digest).kin(model.family, model.shape, model.process)
        assert held.word is (Word.CLEAN if kin else Word.INCONCLUSIVE), held
