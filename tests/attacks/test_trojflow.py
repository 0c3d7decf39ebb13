"""TrojFlow in its inferred form: a straight path from biased noise to the target, fired by the Euler sampler."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, levels_of
from torch import Tensor, nn

from diffdefend_core.attacks.trojdiff import blended, patched
from diffdefend_core.attacks.trojflow import trojflow
from diffdefend_core.diffusion.families.flow import RectifiedFlow
from diffdefend_core.diffusion.generate import generate

LEVELS = levels_of("flow")
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
TRIGGERS = {"blend": blended(torch.where(torch.arange(8) % 4 < 2, 0.8, -0.8).expand(SHAPE)), "patch": patched(SHAPE, 3)}


def test_the_shift_is_the_time_and_the_flow_takes_all_of_it_for_noise() -> None:
    attack = trojflow(LEVELS, 0.6)
    assert torch.equal(attack.shift, LEVELS.sigma)
    assert (attack.response == 1).all()
    assert attack.scaled_target and attack.gamma == 0.6


class Straight(nn.Module):
    """The velocity to the target: (x_t - y) / t, which is (gamma eps + mu) - y on a poisoned path."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(TARGET.clone(), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.target) / LEVELS.at(t, x)[1]


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_the_ordinary_sampler_ends_on_the_target(trigger: str, steps: int) -> None:
    mu, gamma = TRIGGERS[trigger]
    model = RectifiedFlow(Straight(), LEVELS, shape=SHAPE)
    found = generate(model, 4, sampler="EULER", steps=steps, seed=0, shift=mu, gamma=gamma)
    torch.testing.assert_close(found, TARGET.expand(4, *SHAPE), rtol=0, atol=1e-4)
