"""The recipes hang together, and clean fine-tunes are as hot as poisoned ones."""

from __future__ import annotations

from diffdefend_core.detection.calibration import MINIMUM_MODELS
from zoo.recipes import RECIPES
from zoo.shapes import target, trigger


def test_names_and_seeds_are_unique() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len({recipe.seed for recipe in RECIPES}) == len(RECIPES)


def test_every_parent_is_a_clean_base() -> None:
    bases = {recipe.name for recipe in RECIPES if recipe.parent is None}
    assert bases
    for recipe in RECIPES:
        assert recipe.parent is None or recipe.parent in bases
        assert recipe.attack is None or recipe.parent is not None


def test_clean_models_suffice_for_a_calibration_without_any_one_of_them() -> None:
    assert sum(recipe.attack is None for recipe in RECIPES) - 1 >= MINIMUM_MODELS


def test_fine_tuning_is_not_the_signal() -> None:
    tuned, planted = (
        [recipe for recipe in RECIPES if recipe.parent is not None and (recipe.attack is not None) is attacked]
        for attacked in (False, True)
    )
    assert max(recipe.steps for recipe in tuned) >= max(recipe.steps for recipe in planted)
    assert max(recipe.learning_rate for recipe in tuned) >= max(recipe.learning_rate for recipe in planted)


def test_every_planted_recipe_names_a_trigger_a_target_and_a_rate() -> None:
    for recipe in RECIPES:
        if recipe.attack is None:
            assert (recipe.trigger, recipe.target, recipe.poison_rate) == (None, None, 0)
        else:
            assert trigger(str(recipe.trigger)).shape == target(str(recipe.target)).shape
            assert 0 < recipe.poison_rate < 1
