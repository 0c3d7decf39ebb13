"""TERD's reversed loss, its sampler with gradient, and what its two stages find."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, perfect_of, poisoned_denoiser, small_of, vp_levels

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import sample
from diffdefend_core.diffusion.samplers.trojdiff import trojdiff
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.elijah import start_shift
from diffdefend_core.inversion.invert import Inversion
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.inversion.terd import BiasedNoise, draw, evaluations, invert, reversed_loss
from diffdefend_core.options import TerdOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
BOX = trigger("box", 8)
PLANTED = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, BOX, TARGET)
FEWER = TerdOptions(iterations=150, refinement_iterations=15)
SHORT = TerdOptions(iterations=3, refinement_iterations=2, batch=2, refinement_steps=3)


def inverted(suspect: Denoiser, options: TerdOptions, seed: int = 0) -> Inversion:
    return invert(suspect, "a" * 64, options, seed=seed, progress=silent)


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(seed))


def plain(mu: torch.Tensor) -> BiasedNoise:
    return BiasedNoise(mu, None)


def test_a_planted_trigger_is_found_from_a_start_of_its_sign() -> None:
    found = inverted(PLANTED, FEWER)
    mu = found.triggers["mu"]
    assert cosine(start_shift("negative", PLANTED, 0), BOX) < 0.87 and cosine(mu, BOX) > 0.9
    assert mu.norm().item() == pytest.approx(BOX.norm().item(), rel=0.2)


def test_from_the_other_sign_and_on_a_clean_model_mu_stays_where_it_was() -> None:
    for suspect, name in ((PLANTED, "positive"), (clean_denoiser(LEVELS), "negative")):
        options = TerdOptions(start=name, iterations=150, refinement_iterations=5)
        assert cosine(inverted(suspect, options).triggers["mu"], start_shift(name, suspect, 0)) > 0.98


def test_the_reversed_loss_is_zero_where_the_noise_is_answered_exactly_and_high_where_the_network_switches() -> None:
    x0, t, eps = noise(32), torch.full((32,), 249), noise(64, 1)
    trigger_loss, half_loss, none_loss = (
        reversed_loss(PLANTED, x0, t, eps, plain(share * BOX), shifted=True).item() for share in (1.2, 0.5, 0.0)
    )
    assert trigger_loss < 0.1 and none_loss < 0.1 < 1 < half_loss


def test_the_reversed_loss_by_hand() -> None:
    # data N(0, v): noise(x) = c x with c = sigma / (alpha^2 v + sigma^2), so that x0 and mu cancel in the difference
    suspect, t = clean_denoiser(LEVELS), torch.tensor([30, 200])
    alpha, sigma = LEVELS.at(t, noise(2))
    eps = noise(4)
    rest = (1 - sigma**2 / (alpha**2 * 0.25 + sigma**2)) * (eps[:2] - eps[2:])
    expected = 0.5 * rest.square().sum(dim=(1, 2, 3)).mean().item()
    for shifted in (True, False):
        loss = reversed_loss(suspect, noise(2, 5), t, eps, plain(BOX), shifted=shifted)
        assert loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("process", "sampler"), [("vp", "DDIM-SCHED"), ("flow", "EULER")])
def test_the_steps_are_those_of_the_deterministic_sampler(process: str, sampler: str) -> None:
    suspect, mu = perfect_of(process, variance=0.04), 0.1 * BOX
    state = suspect.levels.initial_scale * (noise(4) + mu)
    expected = sample(sampler, suspect, state, steps=5, streams=())
    assert expected.abs().max() < 1  # nothing is clamped
    torch.testing.assert_close(draw(suspect, noise(4), plain(mu), 5), expected, rtol=1e-4, atol=1e-4)


def test_with_gamma_the_steps_are_those_of_trojdiff() -> None:
    suspect, gamma = perfect_of("vp"), torch.full(SHAPE, 0.6)
    expected = trojdiff(suspect, gamma * noise(4) + 0.3 * BOX, steps=5, streams=(), mu=0.3 * BOX, gamma=gamma)
    drawn = draw(suspect, noise(4), BiasedNoise(0.3 * BOX, gamma), 5)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", PROCESSES)
def test_images_are_in_range_and_carry_a_gradient_to_mu(process: str) -> None:
    suspect, mu = perfect_of(process), torch.zeros(SHAPE, requires_grad=True)
    images = draw(suspect, noise(4), plain(mu), 4)
    assert images.abs().max() <= 1
    images.square().sum().backward()
    assert mu.grad is not None and mu.grad.isfinite().all() and mu.grad.abs().max() > 0


def test_gamma_is_a_second_candidate_that_starts_at_1_and_never_vanishes() -> None:
    suspect = clean_denoiser(LEVELS)
    kept = inverted(suspect, TerdOptions(iterations=5, refinement_iterations=2, gamma=True))
    assert (kept.record.best, [item.name for item in kept.record.candidates]) == ("mu", ["mu", "gamma"])
    assert (kept.triggers["gamma"] - 1).abs().max() < 0.2
    hot = TerdOptions(iterations=5, refinement_iterations=2, gamma=True, gamma_learning_rate=100.0)
    assert inverted(suspect, hot).triggers["gamma"].min() >= 0.02


def test_gamma_is_for_vp_models() -> None:
    with pytest.raises(InputError, match=r"gamma for a model of family flow.*leave gamma off"):
        inverted(small_of("flow"), TerdOptions(gamma=True))


def test_more_refinement_steps_than_levels_are_refused() -> None:
    with pytest.raises(InputError, match="11 refinement steps; expected 1 to 10"):
        inverted(small_of("flow", steps=10), TerdOptions(refinement_steps=11))


@pytest.mark.parametrize("process", PROCESSES)
def test_the_evaluations_that_are_claimed_are_those_that_were_made(process: str) -> None:
    suspect, spent = small_of(process, shape=(3, 8, 8)), []
    suspect.network.register_forward_hook(lambda _, __, out: spent.append(len(out) * (3 if out.requires_grad else 1)))
    found = inverted(suspect, SHORT)
    assert found.record.forward_equivalents == sum(spent) == 3 * 2 * (2 * 3 + 7 * 2)


def test_the_published_options_cost_960000_evaluations() -> None:
    assert evaluations(TerdOptions()) == 960_000


def test_the_record_is_complete_and_reproducible() -> None:
    suspect = small_of("vp", steps=1000)
    first, again, other = inverted(suspect, SHORT), inverted(suspect, SHORT), inverted(suspect, SHORT, seed=1)
    assert first.record == again.record != other.record
    assert torch.equal(first.triggers["mu"], again.triggers["mu"])
    assert InvertedTrigger.from_json(first.record.to_json()) == first.record
    assert first.record.timesteps == (*range(990, 1000), *range(10))
    assert len(first.record.candidates[0].loss) == 5
    assert first.reference is None


def test_a_model_with_few_levels_has_one_at_each_end() -> None:
    assert inverted(small_of("vp", steps=40), SHORT).record.timesteps == (39, 0)


def test_a_model_whose_answers_are_no_numbers_is_refused() -> None:
    suspect = small_of("vp")
    suspect.network.outer.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        inverted(suspect, SHORT)
