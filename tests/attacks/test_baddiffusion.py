"""BadDiffusion against its closed form and the numbers of algorithms.md 0.5 and 5.5."""

from __future__ import annotations

import pytest
import torch

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas

BETAS = linear_betas(1000)
LEVELS = Levels.variance_preserving(alphas_cumprod(BETAS))
ATTACK = baddiffusion(LEVELS)


def test_the_response_is_the_closed_form() -> None:
    expected = LEVELS.sigma / (1 + (1 - BETAS).sqrt())
    torch.testing.assert_close(ATTACK.response, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("t", "alpha", "shift", "response"),
    [
        (999, 0.0064, 0.9936, 0.5025),
        (900, 0.0164, 0.9836, 0.5022),
        (700, 0.0829, 0.9171, 0.5000),
        (500, 0.2789, 0.7211, 0.4814),
        (100, 0.9461, 0.0539, 0.1620),
    ],
)
def test_the_golden_numbers(t: int, alpha: float, shift: float, response: float) -> None:
    assert LEVELS.alpha[t].item() == pytest.approx(alpha, abs=5e-5)
    assert ATTACK.shift[t].item() == pytest.approx(shift, abs=5e-5)
    assert ATTACK.response[t].item() == pytest.approx(response, abs=5e-5)
    assert ATTACK.gamma == 1


@pytest.mark.parametrize(("t", "expected"), [(999, 77.31), (700, 5.05)])
def test_the_trigger_moves_the_predicted_clean_data(t: int, expected: float) -> None:
    moved = (ATTACK.shift[t] - LEVELS.sigma[t] * ATTACK.response[t]) / LEVELS.alpha[t]
    assert moved.item() == pytest.approx(expected, rel=1e-3)


def test_the_closed_form_of_another_schedule_does_not_fit() -> None:
    other = (1 - linear_betas(1000, 1e-4, 0.2)).sqrt()
    assert not torch.allclose(ATTACK.response, LEVELS.sigma / (1 + other), rtol=1e-3)
