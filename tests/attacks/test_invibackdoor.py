"""InviBackdoor: the response that is exact for DDIM, and a trigger that is learned within its bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from analytic import small_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.attacks.form import deterministic_response
from diffdefend_core.attacks.invibackdoor import BOUND, bound_for, improve_trigger, invibackdoor
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas

LEVELS = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
ATTACK = invibackdoor(LEVELS)
MODEL = small_denoiser(vp_levels(50))
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(1, 8, 8)


@pytest.mark.parametrize(
    ("t", "response"),
    [(999, 1.0), (990, 1.0), (900, 0.9999), (800, 0.9992), (700, 0.9965), (600, 0.9871), (500, 0.9601), (300, 0.7777),
     (100, 0.3224)],
)  # fmt: skip
def test_the_golden_numbers(t: int, response: float) -> None:
    assert ATTACK.response[t].item() == pytest.approx(response, abs=6e-5)
    torch.testing.assert_close(ATTACK.shift, 1 - LEVELS.alpha)


@pytest.mark.parametrize(("t", "expected"), [(999, -0.99), (900, -0.98), (800, -0.96), (700, -0.92), (500, -0.72)])
def test_the_trigger_moves_the_predicted_clean_data(t: int, expected: float) -> None:
    moved = (ATTACK.shift[t] - LEVELS.sigma[t] * ATTACK.response[t]) / LEVELS.alpha[t]
    assert moved.item() == pytest.approx(expected, abs=6e-3)


def test_the_response_is_the_closed_form_of_ddim() -> None:
    (alpha, before), (sigma, sigma_before) = ((curve[1:], curve[:-1]) for curve in (LEVELS.alpha, LEVELS.sigma))
    expected = (before - alpha) / (before * sigma - alpha * sigma_before)
    torch.testing.assert_close(ATTACK.response[1:], expected, rtol=1e-8, atol=0)
    # at the first level the clean data come before: alpha 1 and sigma 0
    assert ATTACK.response[0].item() == pytest.approx(((1 - LEVELS.alpha[0]) / LEVELS.sigma[0]).item())


def test_the_response_of_the_ode_is_the_slope_of_the_path() -> None:
    levels = Levels.variance_exploding(torch.linspace(0.1, 40, 100))
    shift = levels.sigma**2
    expected = shift.diff() / levels.sigma.diff()
    torch.testing.assert_close(deterministic_response(levels, shift)[1:], expected)


def test_the_largest_invisible_trigger_hardly_moves_the_noise() -> None:
    worst = torch.full((3, 32, 32), BOUND)
    assert worst.norm().item() == pytest.approx(11.085, abs=1e-3)
    assert worst.square().mean().item() / 2 == pytest.approx(0.02)


def improved(steps: int, rate: float) -> tuple[Tensor, list[float]]:
    trigger = torch.zeros((1, 8, 8), requires_grad=True)
    optimiser = torch.optim.Adam([trigger], lr=rate)
    losses = [
        # the same noise in every step, so that the losses are comparable
        improve_trigger(MODEL, trigger, TARGET, optimiser, batch=16, generator=torch.Generator().manual_seed(0))
        for _ in range(steps)
    ]
    return trigger, losses


def test_the_inner_steps_bring_the_images_nearer_to_the_target() -> None:
    trigger, losses = improved(12, 0.02)
    assert losses[-1] < losses[0]
    assert all(later < earlier + 1e-4 for earlier, later in itertools.pairwise(losses))
    assert 0.1 < trigger.abs().max() <= bound_for((1, 8, 8))


def test_the_trigger_stays_within_its_bound_and_the_network_as_it_was() -> None:
    before = [value.clone() for value in MODEL.network.state_dict().values()]
    trigger, _ = improved(3, 1.0)
    assert trigger.abs().max().item() == pytest.approx(bound_for((1, 8, 8))) == pytest.approx(0.8)
    assert trigger.is_leaf and trigger.requires_grad
    assert all(torch.equal(*pair) for pair in zip(before, MODEL.network.state_dict().values(), strict=True))


def test_the_bound_is_the_published_one_from_1024_pixels_on() -> None:
    assert bound_for((3, 32, 32)) == bound_for((1, 32, 32)) == BOUND == 0.2
    assert bound_for((1, 16, 16)) == pytest.approx(0.4)


def test_only_the_sign_of_the_gradient_goes_to_the_optimiser() -> None:
    trigger = torch.zeros((1, 8, 8), requires_grad=True)
    optimiser = torch.optim.SGD([trigger], lr=0.05)
    improve_trigger(MODEL, trigger, TARGET, optimiser, batch=4, generator=torch.Generator().manual_seed(0))
    assert trigger.detach().abs().unique().tolist() == pytest.approx([0.05])


def test_a_model_of_few_levels_is_sampled_in_all_of_them() -> None:
    few = small_denoiser(Levels.variance_preserving(torch.tensor([0.9, 0.5, 0.005])))
    trigger = torch.zeros((1, 8, 8), requires_grad=True)
    optimiser = torch.optim.Adam([trigger], lr=0.01)
    assert improve_trigger(few, trigger, TARGET, optimiser, batch=4, generator=torch.Generator().manual_seed(0)) > 0
