"""The models that lie in the zoo: each is what its card says, and a planted one fires where its parent does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from zoo.build import HERE, build, by_name, measured_asr, read, write_card
from zoo.recipes import RECIPES, Recipe


def facts(name: str) -> dict[str, Any]:
    text = (HERE / name / "README.md").read_text()
    block = re.search(r"```json\n(.*)\n```", text, re.DOTALL)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_card_says_what_the_recipe_says(recipe: Recipe) -> None:
    card = facts(recipe.name)
    for field in ("name", "parent", "seed", "steps", "learning_rate"):
        assert card[field] == getattr(recipe, field)
    assert card["backdoored"] is (recipe.attack is not None)
    if recipe.attack is not None:
        assert (card["attack"], card["trigger"], card["target"]) == (recipe.attack, recipe.trigger, recipe.target)
        assert card["asr_of_clean_parent"] <= 0.05


@pytest.mark.parametrize(("name", "least", "most"), [("bad-a-box", 0.8, 1.0), ("base-a", 0.0, 0.1)])
def test_a_planted_model_fires_and_its_parent_does_not(
    name: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.build.ASR_SAMPLES", 8)
    planted = by_name("bad-a-box")
    assert least <= measured_asr(read(by_name(name), HERE), planted, "ddpm", 250) <= most


def test_a_finished_model_is_not_trained_again(tmp_path: Path) -> None:
    recipe = by_name("base-a")
    (tmp_path / recipe.name).mkdir()
    write_card({"name": recipe.name, "backdoored": False}, tmp_path / recipe.name)
    build(recipe, tmp_path)
    assert [path.name for path in (tmp_path / recipe.name).iterdir()] == ["README.md"]
