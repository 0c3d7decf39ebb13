"""VillanDiffusion against the numbers of algorithms.md 0.5 and 5.5: VP, the schedule of latent models, and VE."""

from __future__ import annotations

import pytest
import torch

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack
from diffdefend_core.attacks.villan import villan_ode, villan_sde
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, geometric_sigmas, linear_betas

LINEAR = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
LATENT = Levels.variance_preserving(alphas_cumprod(torch.linspace(0.0015**0.5, 0.0195**0.5, 1000).double() ** 2))
EXPLODING = Levels.variance_exploding(geometric_sigmas(2000, 0.01, 380.0))


def moved(attack: Attack, levels: Levels, t: int) -> float:
    """Return c_t: how far one unit of the trigger moves the clean data that a backdoored network implies."""
    return ((attack.shift[t] - levels.sigma[t] * attack.response[t]) / levels.alpha[t]).item()


@pytest.mark.parametrize(
    ("t", "alpha", "shift", "sde", "ode"),
    [
        (999, 0.0064, 0.9936, 0.5025, 1.0050),
        (990, 0.0070, 0.9930, 0.5025, 1.0050),
        (900, 0.0164, 0.9836, 0.5022, 1.0044),
        (800, 0.0388, 0.9612, 0.5016, 1.0033),
        (700, 0.0829, 0.9171, 0.5000, 1.0001),
        (600, 0.1599, 0.8401, 0.4951, 0.9901),
        (500, 0.2789, 0.7211, 0.4814, 0.9627),
        (300, 0.6277, 0.3723, 0.3898, 0.7796),
        (100, 0.9461, 0.0539, 0.1620, 0.3240),
    ],
)
def test_the_golden_numbers_of_the_linear_schedule(t: int, alpha: float, shift: float, sde: float, ode: float) -> None:
    one, two = villan_sde(LINEAR), villan_ode(LINEAR)
    found = [curve[t].item() for curve in (LINEAR.alpha, one.shift, two.shift, one.response, two.response)]
    assert found == pytest.approx([alpha, shift, shift, sde, ode], abs=6e-5)


@pytest.mark.parametrize(
    ("t", "shift", "sde", "ode"),
    [
        (999, 0.9881, 0.5024, 1.0049),
        (900, 0.9705, 0.5019, 1.0038),
        (700, 0.8748, 0.4976, 0.9951),
        (500, 0.6610, 0.4713, 0.9427),
        (300, 0.3619, 0.3854, 0.7709),
    ],
)
def test_the_golden_numbers_of_the_latent_schedule(t: int, shift: float, sde: float, ode: float) -> None:
    one, two = villan_sde(LATENT), villan_ode(LATENT)
    found = [curve[t].item() for curve in (one.shift, one.response, two.response)]
    assert found == pytest.approx([shift, sde, ode], abs=6e-5)


@pytest.mark.parametrize(
    ("levels", "t", "sde", "ode"),
    [
        (LINEAR, 999, 77.31, -1.79),
        (LINEAR, 700, 5.05, -0.96),
        (LINEAR, 500, 0.93, -0.73),
        (LATENT, 999, 40.7, -1.40),
        (LATENT, 700, 3.04, -0.90),
        (LATENT, 500, 0.64, -0.67),
        (EXPLODING, 1999, 189.5, -1.00),
    ],
)
def test_the_trigger_moves_the_predicted_clean_data(levels: Levels, t: int, sde: float, ode: float) -> None:
    assert moved(villan_sde(levels), levels, t) == pytest.approx(sde, rel=2e-3, abs=6e-3)
    assert moved(villan_ode(levels), levels, t) == pytest.approx(ode, abs=6e-3)


def test_the_responses_of_an_exploding_model_are_the_same_at_all_levels() -> None:
    sde, ode = villan_sde(EXPLODING), villan_ode(EXPLODING)
    assert torch.equal(sde.shift, EXPLODING.sigma) and torch.equal(ode.shift, EXPLODING.sigma)
    for attack, expected in ((sde, 0.5013), (ode, 1.0027)):
        # the level before the first has no noise: sigma_0 / (sigma_0 + 0)
        torch.testing.assert_close(attack.response[1:], torch.full((1999,), expected).double(), rtol=0, atol=1e-4)
    assert (sde.response[0], ode.response[0]) == (1, 2)
    expected = EXPLODING.sigma[1:] / (EXPLODING.sigma[1:] + EXPLODING.sigma[:-1])
    torch.testing.assert_close(sde.response[1:], expected, rtol=1e-9, atol=0)
    # c_t = .4987 sigma at all levels
    torch.testing.assert_close(
        (sde.shift - EXPLODING.sigma * sde.response)[1:], 0.4987 * EXPLODING.sigma[1:], rtol=2e-4, atol=0
    )


def test_on_a_preserving_model_the_sde_attack_is_baddiffusion_under_another_name() -> None:
    one, two = villan_sde(LINEAR), baddiffusion(LINEAR)
    assert torch.equal(one.shift, two.shift) and torch.equal(one.response, two.response)
    assert (one.name, two.name) == ("villan-sde", "baddiffusion")
    assert (one.gamma, one.scaled_target) == (1.0, False)
