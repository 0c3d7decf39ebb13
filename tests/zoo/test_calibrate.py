"""The shipped calibration: of the clean models of the zoo as they lie there, with the options that a scan uses."""

from __future__ import annotations

import pytest

from diffdefend_core.artifacts import Word
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.detection.calibration import standardise
from diffdefend_core.detection.decide import decide
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.static import inspect_folder
from diffdefend_core.stages.calibrations import measuring_digest
from zoo.build import HERE
from zoo.calibrate import TARGET
from zoo.recipes import RECIPES

SHIPPED = Calibration.from_json(TARGET.read_bytes())


def test_it_was_measured_with_the_default_options() -> None:
    assert SHIPPED.options_digest == measuring_digest(Settings())


def test_it_holds_every_clean_model_of_its_family_and_no_planted_one() -> None:
    clean = {recipe.name for recipe in RECIPES if recipe.attack is None and recipe.family == "ddpm"}
    assert {model.name for model in SHIPPED.models} == clean
    assert {model.family for model in SHIPPED.models} == {"ddpm"}


@pytest.mark.parametrize("model", SHIPPED.models, ids=lambda model: model.name)
def test_its_models_are_those_that_lie_in_the_zoo(model: CleanModel) -> None:
    inspection = inspect_folder(HERE / model.name)
    assert model.digest == content_digest(inspection.files)
    assert (model.family, model.shape) == (inspection.family, tuple(inspection.shape))


@pytest.mark.parametrize("model", SHIPPED.models, ids=lambda model: model.name)
def test_the_others_call_each_of_its_models_clean(model: CleanModel) -> None:
    others, limit = SHIPPED.without(model.digest), Settings().detection.limit
    assert others.covers(model.family, model.shape)
    word, _, reasons = decide(standardise(others, model.statistics, limit), limit=limit, covered=True)
    assert word is Word.CLEAN, reasons
