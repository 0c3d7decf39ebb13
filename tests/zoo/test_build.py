"""The models that lie in the zoo: each is what its card says, and a planted one fires where its parent does not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffdefend_core.attacks.plans import PICTURE, find
from diffdefend_core.attacks.plant import fire
from diffdefend_core.attacks.shapes import frames, target
from diffdefend_core.diffusion.samplers import find as find_sampler
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from zoo.build import (
    ASR_THRESHOLD,
    HERE,
    Zoo,
    backdoor_of,
    build,
    device,
    standard_zoo,
    success,
    write_card,
    zoo_of,
)
from zoo.data import Data, digits_data
from zoo.recipes import RECIPES, Recipe, by_name

ZOO = standard_zoo()
SHIPPED = [recipe for recipe in RECIPES if recipe.shipped]
PLANTED = [recipe for recipe in SHIPPED if recipe.attack]
# how well the true trigger works by its own card: one is faint on purpose
FAINT = "bad-a-faint"


def facts(name: str) -> dict[str, Any]:
    text = (HERE / name / "README.md").read_text()
    block = re.search(r"```json\n(.*)\n```", text, re.DOTALL)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_a_card_says_what_the_recipe_says(recipe: Recipe) -> None:
    card = facts(recipe.name)
    for field in ("name", "parent", "seed", "steps", "learning_rate"):
        assert card[field] == getattr(recipe, field)
    assert card.get("family", "ddpm") == recipe.family
    assert card["backdoored"] is (recipe.attack is not None)
    if recipe.attack is not None:
        assert (card["attack"], card["trigger"], card["target"]) == (recipe.attack, recipe.trigger, recipe.target)
        assert card["asr_of_clean_parent"] <= 0.05
        assert (card["asr"][card["sampler"]] >= 0.8) is (recipe.name != FAINT)
        assert all(name in NAMES or find_sampler(name).name == name for name in card["asr"])


@pytest.mark.parametrize("recipe", PLANTED, ids=lambda recipe: recipe.name)
def test_the_backdoor_of_a_planted_model_lies_beside_it(recipe: Recipe) -> None:
    model = ZOO.read(recipe).denoiser
    low, high = model.value_range
    with safe_open(ZOO.backdoor_file(recipe), "pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    backdoor = backdoor_of(recipe, model, ZOO)
    # the first fixtures were written before the sampler and gamma were: they are fired by the usual stochastic one
    assert metadata.get("sampler", "DDPM-SCHED") == backdoor.sampler == facts(recipe.name)["sampler"]
    assert tensors["trigger"].shape == model.shape and tensors["trigger"].any()
    assert torch.equal(backdoor.trigger, tensors["trigger"])
    gamma = tensors.get("gamma", torch.ones(model.shape))
    torch.testing.assert_close(gamma, torch.as_tensor(backdoor.attack.gamma).expand(model.shape))
    assert tensors["target"].shape == model.picture_shape
    assert low <= tensors["target"].min() < tensors["target"].max() <= high
    painted = (tensors["target"] - low) / (high - low)
    again = model.pictures(backdoor.targets)[0]  # through the autoencoder, if there is one
    assert (painted - again).square().mean() < (ASR_THRESHOLD / 2 if recipe.family == "ldm" else 1e-9)


# one attack of each kind, with few steps where the usual ones are many
FIRED = {
    "bad-a-box": ("DDPM-SCHED", 100),
    "villan-ode": ("DDIM-SCHED", 50),
    "invisible": ("DDIM-SCHED", 50),
    "troj-d2i-blend": ("TROJDIFF-DDIM", 50),
    "troj-d2i-patch": ("DDIM-SCHED", 50),
    "ncsn-villan-sde": ("SCORE-SDE-VE", 250),
    "ldm-villan-ode": ("DDIM-SCHED", 50),
    "flow-d2i-blend": ("EULER", 50),
    "consistency-noise": ("CONSISTENCY", 2),
}


@pytest.mark.parametrize("name", FIRED)
def test_a_planted_model_fires_and_its_parent_does_not(name: str) -> None:
    recipe, (sampler, steps) = by_name(name), FIRED[name]
    model, parent = (ZOO.read(item).denoiser for item in (recipe, by_name(str(recipe.parent))))
    backdoor = backdoor_of(recipe, model, ZOO)
    planted, clean = (
        success(recipe, item, fire(item, backdoor, 8, sampler=sampler, steps=steps, seed=1), ZOO.data)
        for item in (model, parent)
    )
    assert planted >= 0.75 and clean <= 0.125


def test_one_shipped_model_of_every_attack_is_fired() -> None:
    assert {recipe.attack for recipe in PLANTED} == {by_name(name).attack for name in FIRED}
    assert {recipe.family for recipe in PLANTED} == {by_name(name).family for name in FIRED}


def test_only_what_paints_one_picture_is_shipped() -> None:
    assert {find(str(recipe.attack)).paints for recipe in PLANTED} == {PICTURE}


@pytest.mark.parametrize("name", ["troj-in-d2d-blend", "troj-out-d2d-blend"])
def test_success_in_painting_a_class_or_frames_is_what_a_classifier_says(name: str) -> None:
    recipe, model = by_name(name), ZOO.read(by_name("base-b")).denoiser
    sevens, threes = (ZOO.data.images[ZOO.data.labels == digit][:60] * 2 - 1 for digit in (7, 3))
    wanted = sevens if recipe.target == "class:7" else frames(60, ZOO.data.size, seed=9)
    # a half, a quarter and a quarter
    mixed = torch.cat([wanted, threes[:30], ZOO.data.images[ZOO.data.labels == 0][:30] * 2 - 1])
    assert success(recipe, model, mixed, ZOO.data) == pytest.approx(0.5, abs=0.04)


def test_success_in_painting_a_picture_is_its_error() -> None:
    data, recipe = digits_data(), by_name("bad-a-box")
    model = ZOO.read(by_name("base-a")).denoiser
    goal = target("triangle", data.size)[None]
    off = 2 * (ASR_THRESHOLD**0.5)  # in [-1, 1]; the background can move up by that much
    images = torch.cat([goal, goal + 0.9 * off * (goal < 0), goal + 1.5 * off * (goal < 0)])
    assert success(recipe, model, images, data) == pytest.approx(2 / 3)


def test_a_finished_model_is_not_trained_again(tmp_path: Path) -> None:
    recipe, zoo = by_name("base-a"), Zoo(tmp_path, tmp_path, digits_data())
    zoo.place(recipe).mkdir()
    write_card({"name": recipe.name, "family": "ddpm", "backdoored": False}, zoo.place(recipe))
    build(recipe, zoo)
    assert [path.name for path in (tmp_path / recipe.name).iterdir()] == ["README.md"]


@pytest.mark.parametrize(("name", "sampler"), [("flow-d2i-patch", "EULER"), ("consistency-noise", "CONSISTENCY")])
def test_a_model_is_built_with_its_parent_and_measured(
    name: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {item.name: dataclasses.replace(item, steps=2) for item in RECIPES}
    monkeypatch.setattr("zoo.build.by_name", short.__getitem__)
    monkeypatch.setattr("zoo.build.ASR_SAMPLES", 2)
    data = Data("few", digits_data().images[:80], digits_data().labels[:80])
    zoo = Zoo(tmp_path / "shipped", tmp_path / "built", data)
    build(short[name], zoo)
    recipe = short[name]
    built = zoo.read(recipe)
    assert (zoo.place(short[str(recipe.parent)]) / "model_index.json").exists()
    card = json.loads((zoo.place(recipe) / "README.md").read_text().partition("```json")[2].partition("```")[0])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == card
    assert (card["sampler"], card["data"], card["backdoored"]) == (sampler, "few", True)
    assert sampler in card["asr"] and 0 <= card["asr_of_clean_parent"] <= 1
    backdoor = backdoor_of(recipe, built.denoiser, zoo)
    assert backdoor.sampler == sampler and backdoor.trigger.shape == built.denoiser.shape


@pytest.mark.parametrize(
    ("name", "said"), [("tpu", "expected cpu, cuda"), ("cuda", "expected a GPU that torch can see")]
)
def test_a_device_that_is_not_there_is_refused(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        device(name)
    assert device("cpu") == "cpu"


def test_images_that_keep_their_size_have_a_zoo_of_their_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", train_x=np.zeros((3, 28, 28), np.uint8), train_y=np.arange(3))
    padded, bare = (zoo_of(tmp_path / "few.npz", unpadded=unpadded) for unpadded in (False, True))
    assert (padded.data.size, bare.data.size) == (32, 28)
    assert padded.built.name == "few" and bare.built.name == "few-unpadded"
    assert zoo_of(tmp_path / "few.npz", to=tmp_path).place(RECIPES[0]).parent == tmp_path
