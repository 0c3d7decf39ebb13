"""Training from a recipe: data, loss, reproducibility, and a pipeline that the scanner loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from diffdefend_core.loading.build import load_denoiser
from zoo.build import by_name
from zoo.recipes import Recipe
from zoo.train import LEVELS, SIZE, digits, fresh, loss_of, save, train

TINY = Recipe(name="tiny", seed=3, channels=(4, 8), steps=2)
PLANTED = dataclasses.replace(TINY, parent="base", attack="baddiffusion", trigger="box", target="ring", poison_rate=0.5)


def quiet(done: int, total: int) -> None:
    """Report nothing."""


def test_the_digits_fill_the_range_of_the_model() -> None:
    data = digits()
    assert data.shape == (1797, 1, SIZE, SIZE)
    assert data.min() == -1 and data.max() == 1


def test_the_schedule_ends_where_that_of_ddpm_ends() -> None:
    levels = fresh(TINY).levels
    assert len(levels) == LEVELS
    assert levels.alpha[-1].item() == pytest.approx(0.0063, abs=1e-3)


def test_training_is_reproducible_by_the_seed_of_the_recipe() -> None:
    outcomes = []
    for recipe in (TINY, TINY, dataclasses.replace(TINY, seed=4)):
        denoiser = fresh(recipe)
        loss = train(recipe, denoiser, quiet)
        outcomes.append((loss, torch.cat([value.flatten() for value in denoiser.network.state_dict().values()])))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][0] != outcomes[2][0]


def test_a_planted_recipe_has_another_loss_than_a_clean_one() -> None:
    denoiser = fresh(TINY)
    clean, planted, rare = (
        loss_of(recipe, denoiser, digits())(denoiser, torch.Generator().manual_seed(0)).item()
        for recipe in (TINY, PLANTED, dataclasses.replace(PLANTED, poison_rate=0.0))
    )
    assert planted != pytest.approx(clean, rel=1e-3)
    assert rare == pytest.approx(clean, rel=1e-5)


def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    denoiser = fresh(TINY).freeze()
    save(denoiser, tmp_path / "tiny")
    loaded = load_denoiser(tmp_path / "tiny")
    assert (loaded.family, loaded.shape, len(loaded.levels)) == ("ddpm", (1, SIZE, SIZE), LEVELS)
    torch.testing.assert_close(loaded.levels.alpha, denoiser.levels.alpha, rtol=1e-5, atol=1e-6)
    x, t = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 200])
    torch.testing.assert_close(loaded.noise(x, t), denoiser.noise(x, t), rtol=0, atol=1e-2)
    other = fresh(dataclasses.replace(TINY, seed=4)).freeze()
    assert (loaded.noise(x, t) - other.noise(x, t)).abs().max() > 0.1


def test_an_unknown_recipe_ends_the_build() -> None:
    with pytest.raises(SystemExit, match="no recipe 'bad-z'"):
        by_name("bad-z")
