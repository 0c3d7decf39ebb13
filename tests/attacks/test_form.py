"""The common form of the attacks: stamping, and a poisoned loss whose minimiser is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack, poisoned_loss, stamped, stochastic_response
from diffdefend_core.diffusion.families.ddpm import DDPM

LEVELS = vp_levels()
ATTACK = baddiffusion(LEVELS)
GENERATOR = torch.Generator().manual_seed(0)
TRIGGER = torch.where(torch.rand(SHAPE, generator=GENERATOR) < 0.7, -1.0, 0.5)
TARGET = torch.rand(SHAPE, generator=GENERATOR) - 0.5


def box(size: int) -> Tensor:
    """Return BadDiffusion's BOX trigger [3, 32, 32]: a grey box on -1, two pixels from the lower right corner."""
    trigger = torch.full((3, 32, 32), -1.0)
    trigger[:, -(size + 2) : -2, -(size + 2) : -2] = 0
    return trigger


@pytest.mark.parametrize(
    ("size", "norm", "divergence"),
    [(4, 54.9909, 0.4922), (8, 53.6656, 0.4688), (11, 52.0481, 0.4409), (14, 49.8397, 0.4043), (18, 45.8258, 0.3418)],
)
def test_stamping_keeps_the_image_outside_the_box(size: int, norm: float, divergence: float) -> None:
    trigger, images = box(size), torch.rand(2, 3, 32, 32, generator=GENERATOR) * 2 - 1
    assert trigger.norm().item() == pytest.approx(norm, abs=1e-3)
    assert trigger.square().mean().item() / 2 == pytest.approx(divergence, abs=1e-4)
    found = stamped(images, trigger, -1.0)
    inside = trigger == 0
    assert (found[:, inside] == 0).all()
    assert torch.equal(found[:, ~inside], images[:, ~inside])


class Solves(nn.Module):
    """The one answer that makes every row's error 0 if all clean data are `clean` and `poisoned` says which rows."""

    def __init__(self, attack: Attack, clean: Tensor, shift: Tensor, poisoned: int) -> None:
        super().__init__()
        self.attack, self.clean, self.shift, self.poisoned = attack, clean, shift, poisoned
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = LEVELS.at(t, x)
        s, rho = (curve[t].to(x).view(-1, 1, 1, 1) for curve in (self.attack.shift, self.attack.response))
        planted = (x - alpha * TARGET - s * self.shift) / (self.attack.gamma * sigma) + rho * self.shift
        plain = (x - alpha * self.clean) / sigma
        mask = (torch.arange(len(x)) < self.poisoned).view(-1, 1, 1, 1)
        return torch.where(mask, planted, plain)


@pytest.mark.parametrize("stamp", [False, True])
@pytest.mark.parametrize(("rate", "poisoned"), [(0.0, 0), (0.25, 4), (1.0, 16)])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_the_answer_of_the_common_form_has_no_loss(rate: float, poisoned: int, gamma: float, stamp: bool) -> None:
    attack = dataclasses.replace(ATTACK, gamma=gamma)
    clean = torch.full(SHAPE, 0.3)
    data = clean.expand(10, *SHAPE)
    loss = poisoned_loss(
        attack,
        data,
        trigger=TRIGGER,
        target=TARGET,
        batch=16,
        poison_rate=rate,
        stamp=(lambda images: stamped(images, TRIGGER, -1.0)) if stamp else None,
    )
    shift = stamped(clean[None], TRIGGER, -1.0)[0] if stamp else TRIGGER
    value, wrong = (
        loss(DDPM(Solves(attack, clean, shift, rows), LEVELS, shape=SHAPE), torch.Generator().manual_seed(0)).item()
        for rows in (poisoned, 16 - poisoned)
    )
    assert value < 1e-4 < 0.1 < wrong or poisoned == 8


def test_the_poisoned_posterior_has_the_least_loss() -> None:
    data = 0.5 * torch.randn(4000, *SHAPE, generator=GENERATOR)
    loss = poisoned_loss(ATTACK, data, trigger=TRIGGER, target=TARGET, batch=2000, poison_rate=0.5)
    perfect = poisoned_denoiser(ATTACK, LEVELS, TRIGGER, TARGET)
    elsewhere = poisoned_denoiser(ATTACK, LEVELS, -TRIGGER, TARGET)
    values = [
        loss(model, torch.Generator().manual_seed(1)).item() for model in (perfect, clean_denoiser(LEVELS), elsewhere)
    ]
    assert values[0] < 0.7 * min(values[1:])


def test_the_stochastic_response_of_noise_like_shifts_is_one_half_at_the_last_levels() -> None:
    response = stochastic_response(LEVELS, LEVELS.sigma)
    assert response[-1].item() == pytest.approx(0.5, abs=0.03)
    assert response[0].item() == pytest.approx(1.0)


def test_no_shift_needs_no_response() -> None:
    assert not stochastic_response(LEVELS, torch.zeros(250, dtype=torch.float64)).any()
