"""Training from a recipe: its backdoor, its phases, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

import zoo.train as module
from diffdefend_core.attacks.plans import find
from zoo.data import Data, digits_data
from zoo.networks import Model, untrained, vector_quantiser
from zoo.recipes import RECIPES, Recipe, by_name
from zoo.train import clean_data, planned, targets, train, train_autoencoder

TINY = Recipe(name="tiny", seed=3, channels=(4, 8), steps=2)
PLANTED = dataclasses.replace(TINY, parent="base", attack="baddiffusion", trigger="box", target="ring", poison_rate=0.5)
FAMILIES = {
    "ddpm": "villan-ode",
    "ncsn": "villan-sde",
    "flow": "trojflow-d2i-blend",
    "consistency": "consistency-backdoor",
    "ldm": "villan-ode",
}
DATA = digits_data()


def tiny(family: str) -> Recipe:
    return dataclasses.replace(TINY, family=family, channels=(4, 8))


def fresh(recipe: Recipe) -> Model:
    return untrained(recipe, DATA.size, recipe.seed)


def quiet(done: int, total: int) -> None:
    """Report nothing."""


def weights(model: Model) -> Tensor:
    return torch.cat([value.flatten() for value in model.unet.state_dict().values()]).clone()


@pytest.fixture(autouse=True)
def _short_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_autoencoder", functools.partial(train_autoencoder, steps=2))


def test_training_is_reproducible_by_the_seed_of_the_recipe() -> None:
    outcomes = []
    for recipe in (TINY, TINY, dataclasses.replace(TINY, seed=4)):
        model = fresh(recipe)
        loss, backdoor = train(recipe, model, DATA, quiet)
        assert backdoor is None
        outcomes.append((loss, weights(model)))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][0] != outcomes[2][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_clean_and_planted(family: str) -> None:
    base = dataclasses.replace(TINY, family=family)
    planted = dataclasses.replace(PLANTED, family=family, attack=FAMILIES[family])
    for recipe in (base, planted):
        model = fresh(recipe)
        before, seen = weights(model), list[tuple[int, int]]()
        loss, backdoor = train(recipe, model, DATA, lambda *step, seen=seen: seen.append(step))  # type: ignore[misc]
        assert 0 < loss < 100
        assert not torch.equal(weights(model), before)
        assert seen[-2:] == [(1, 2), (2, 2)]
        assert (backdoor is None) is (recipe.attack is None)
        if backdoor is not None:
            assert backdoor.trigger.shape == model.denoiser.shape


def test_a_planted_recipe_has_another_loss_than_a_clean_one() -> None:
    losses = {}
    for name, recipe in {
        "clean": dataclasses.replace(TINY, parent="base"),
        "planted": PLANTED,
        "rare": dataclasses.replace(PLANTED, poison_rate=0.0),
    }.items():
        losses[name], _ = train(dataclasses.replace(recipe, steps=1), fresh(recipe), DATA, quiet)
    assert losses["planted"] != pytest.approx(losses["clean"], rel=1e-3)
    assert losses["rare"] == pytest.approx(losses["clean"], rel=1e-5)


def test_a_base_consistency_model_learns_to_denoise_first(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("diffusion_loss", "consistency_loss"):

        def counted(data: Tensor, batch: int, name: str = name, real: object = getattr(module, name)) -> object:
            called.append(name)
            return real(data, batch)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    recipe = dataclasses.replace(TINY, family="consistency", steps=4)
    train(recipe, fresh(recipe), DATA, quiet)
    assert called == ["diffusion_loss", "consistency_loss"]
    called.clear()
    tuned = dataclasses.replace(recipe, parent="base-consistency")
    train(tuned, fresh(tuned), DATA, quiet)
    assert called == ["consistency_loss"]


def test_the_autoencoder_learns_to_paint_the_digits() -> None:
    torch.manual_seed(0)
    autoencoder, pictures = vector_quantiser(DATA.size), DATA.images * 2 - 1

    def error() -> float:
        with torch.no_grad():
            return (autoencoder(pictures[:64]).sample - pictures[:64]).square().mean().item()

    before = error()
    train_autoencoder(autoencoder, pictures, 0, quiet, steps=25)
    assert error() < 0.7 * before
    assert not autoencoder.training and not any(item.requires_grad for item in autoencoder.parameters())


def test_clean_data_are_in_the_space_of_the_model() -> None:
    few = Data("few", DATA.images[:600], DATA.labels[:600])
    for family, low in (("ddpm", -1.0), ("ncsn", 0.0)):
        rows = clean_data(untrained(tiny(family), DATA.size, 0).denoiser, few)
        torch.testing.assert_close(rows, low + few.images * (1 - low))
    latents = clean_data(untrained(tiny("ldm"), DATA.size, 0).denoiser, few)
    assert latents.shape == (600, 3, 8, 8) and not latents.requires_grad


@pytest.mark.parametrize("recipe", [item for item in RECIPES if item.attack], ids=lambda recipe: recipe.name)
def test_every_planted_recipe_can_be_planned(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdefend_core.attacks.plans.small_classifier", lambda *_, **__: torch.nn.Flatten())
    model = untrained(tiny(recipe.family), DATA.size, 0).denoiser
    few = Data("few", DATA.images[:200], DATA.labels[:200])
    backdoor = planned(recipe, model, few)
    assert backdoor.trigger.shape == model.shape and backdoor.targets.shape[1:] == model.shape
    assert backdoor.trigger.any() or recipe.attack == "invibackdoor"


def test_a_class_and_frames_are_targets_of_many_pictures() -> None:
    sevens, outlines = (targets(by_name(name), DATA) for name in ("troj-in-d2d-blend", "troj-out-d2d-blend"))
    assert torch.equal(sevens, DATA.images[DATA.labels == 7])
    assert outlines.shape == (512, 1, DATA.size, DATA.size) and 0 <= outlines.min() < outlines.max() <= 1
    assert find("trojdiff-in-d2d-blend").paints == "class"
    assert len(targets(by_name("bad-a-box"), DATA)) == 1


def test_an_unknown_recipe_ends_the_build() -> None:
    with pytest.raises(SystemExit, match="no recipe 'bad-z'"):
        by_name("bad-z")


@pytest.mark.parametrize(("found", "reduced"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({}, False)])
def test_a_cpu_without_bfloat16_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], reduced: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    with module.mixed_precision(torch.device("cpu")):
        answer = torch.ones(2, 2) @ torch.ones(2, 2)
    assert answer.dtype == (torch.bfloat16 if reduced else torch.float32)
