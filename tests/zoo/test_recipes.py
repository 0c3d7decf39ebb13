"""The recipes hang together, and clean fine-tunes are as hot as poisoned ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffdefend_core.attacks.plans import ATTACKS, CLASS, OTHER, find
from diffdefend_core.attacks.shapes import target, trigger
from diffdefend_core.detection.calibration import MINIMUM_MODELS
from zoo.networks import untrained
from zoo.recipes import APART, RECIPES, base_of, by_name
from zoo.train import DRAWN

FAMILIES = ("ddpm", "ncsn", "ldm", "flow", "consistency")


def test_names_and_seeds_are_unique() -> None:
    every = RECIPES + APART
    assert len({recipe.name for recipe in every}) == len({recipe.seed for recipe in every}) == len(every)


def test_every_parent_is_a_clean_base() -> None:
    bases = {recipe.name for recipe in RECIPES + APART if recipe.parent is None}
    assert bases
    for recipe in RECIPES + APART:
        assert recipe.parent is None or recipe.parent in bases
        assert recipe.attack is None or recipe.parent is not None


def test_a_model_is_of_the_family_of_its_base_and_shipped_only_with_it() -> None:
    for recipe in RECIPES:
        base = base_of(recipe)
        assert base.parent is None and recipe.family == base.family
        assert base.shipped or not recipe.shipped


def test_every_family_has_a_clean_base_and_a_planted_model_that_the_repository_holds() -> None:
    for attacked in (False, True):
        shipped = {recipe.family for recipe in RECIPES if recipe.shipped and (recipe.attack is not None) is attacked}
        assert shipped == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tuned_clean_too(family: str) -> None:
    tuned = [recipe for recipe in RECIPES if recipe.family == family and recipe.parent and not recipe.attack]
    assert len(tuned) >= 2


def test_clean_models_suffice_for_a_calibration_without_any_one_of_them() -> None:
    assert sum(recipe.attack is None and recipe.family == "ddpm" for recipe in RECIPES) - 1 >= MINIMUM_MODELS


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_is_not_the_signal(family: str) -> None:
    tuned, planted = (
        [item for item in RECIPES if item.family == family and item.parent and (item.attack is not None) is attacked]
        for attacked in (False, True)
    )
    assert max(recipe.steps for recipe in tuned) >= max(recipe.steps for recipe in planted)
    assert max(recipe.learning_rate for recipe in tuned) >= max(recipe.learning_rate for recipe in planted)


def test_every_planted_recipe_names_a_trigger_a_target_and_a_rate() -> None:
    for recipe in RECIPES:
        if recipe.attack is None:
            assert (recipe.trigger, recipe.target, recipe.poison_rate) == (None, None, 0)
            continue
        drawn = recipe.attack in ("invibackdoor", "uibdiffusion") or recipe.attack.endswith("patch")
        assert (recipe.trigger in DRAWN) is drawn
        assert drawn or trigger(str(recipe.trigger)).any()
        paints = find(recipe.attack).paints
        if paints == CLASS:
            assert recipe.target is not None and recipe.target.startswith("class:")
        elif paints == OTHER:
            assert recipe.target == "frames"
        else:
            assert target(str(recipe.target)).any()
        assert 0 < recipe.poison_rate < 1


def test_models_that_no_choice_was_made_on_share_no_trigger_and_target_with_one_of_their_attack() -> None:
    pairs = {(item.attack, item.trigger, item.target) for item in RECIPES if item.attack}
    apart = {(item.attack, item.trigger, item.target) for item in APART if item.attack}
    assert apart and not pairs & apart


def test_every_attack_is_planted_on_a_model_that_it_fits() -> None:
    for recipe in RECIPES + APART:
        if recipe.attack is not None:
            process = untrained(replace(base_of(recipe), channels=(4, 8)), 16, 0).denoiser.process
            assert process in find(recipe.attack).processes, recipe.name
    planted = {recipe.attack for recipe in RECIPES}
    assert {name for name in ATTACKS if not name.startswith("trojflow")} <= planted
    assert {"trojflow-d2i-blend", "trojflow-d2i-patch", "trojflow-in-d2d-blend", "trojflow-out-d2d-blend"} <= planted


def test_an_unknown_name_ends_the_build() -> None:
    with pytest.raises(SystemExit, match="no recipe 'bad-z'; expected one of base-a, "):
        by_name("bad-z")
