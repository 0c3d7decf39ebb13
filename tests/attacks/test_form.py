"""The common form of the attacks: stamping, and a poisoned loss whose minimiser is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack, Backdoor, Stamp, poisoned_loss, stamped, stochastic_response
from diffdefend_core.attacks.invibackdoor import invibackdoor
from diffdefend_core.attacks.villan import villan_ode
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas
from diffdefend_core.diffusion.random import generators
from diffdefend_core.diffusion.samplers import sample

LEVELS = vp_levels()
ATTACK = baddiffusion(LEVELS)
GENERATOR = torch.Generator().manual_seed(0)
TRIGGER = torch.where(torch.rand(SHAPE, generator=GENERATOR) < 0.7, -1.0, 0.5)
TARGET = torch.rand(SHAPE, generator=GENERATOR) - 0.5
# the scale of the noise of TrojDiff's patch: one number per pixel
PATCH = torch.where(torch.arange(8) > 5, 0.1, 1.0).expand(SHAPE)


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


def backdoor(attack: Attack, targets: Tensor = TARGET[None], stamp: Stamp | None = None) -> Backdoor:
    """Return an attack with the trigger of these tests."""
    return Backdoor(attack=attack, trigger=TRIGGER, targets=targets, sampler="DDPM-SCHED", stamp=stamp)


class Solves(nn.Module):
    """The one answer that makes every row's error 0 if all clean data are `clean` and `poisoned` says which rows."""

    def __init__(self, attack: Attack, clean: Tensor, shift: Tensor, poisoned: int) -> None:
        super().__init__()
        self.attack, self.clean, self.shift, self.poisoned = attack, clean, shift, poisoned
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = LEVELS.at(t, x)
        s, rho = (curve[t].to(x).view(-1, 1, 1, 1) for curve in (self.attack.shift, self.attack.response))
        planted = (x - alpha * TARGET - s * self.shift) / (self.attack.gamma * sigma)
        if self.attack.scaled_target:
            planted = self.attack.gamma * planted
        planted = planted + rho * self.shift
        plain = (x - alpha * self.clean) / sigma
        mask = (torch.arange(len(x)) < self.poisoned).view(-1, 1, 1, 1)
        return torch.where(mask, planted, plain)


@pytest.mark.parametrize("stamp", [False, True])
@pytest.mark.parametrize(("rate", "poisoned"), [(0.0, 0), (0.25, 4), (1.0, 16)])
@pytest.mark.parametrize(("gamma", "scaled"), [(1.0, False), (0.6, False), (0.6, True), (PATCH, False), (PATCH, True)])
def test_the_answer_of_the_common_form_has_no_loss(
    rate: float, poisoned: int, gamma: float | Tensor, scaled: bool, stamp: bool
) -> None:
    attack = dataclasses.replace(ATTACK, gamma=gamma, scaled_target=scaled)
    clean = torch.full(SHAPE, 0.3)
    data = clean.expand(10, *SHAPE)
    planted = backdoor(attack, stamp=(lambda images: stamped(images, TRIGGER, -1.0)) if stamp else None)
    loss = poisoned_loss(planted, data, batch=16, poison_rate=rate)
    shift = stamped(clean[None], TRIGGER, -1.0)[0] if stamp else TRIGGER
    value, wrong = (
        loss(DDPM(Solves(attack, clean, shift, rows), LEVELS, shape=SHAPE), torch.Generator().manual_seed(0)).item()
        for rows in (poisoned, 16 - poisoned)
    )
    assert value < 1e-4 < 0.1 < wrong or poisoned == 8


def test_the_poisoned_posterior_has_the_least_loss() -> None:
    data = 0.5 * torch.randn(4000, *SHAPE, generator=GENERATOR)
    loss = poisoned_loss(backdoor(ATTACK), data, batch=2000, poison_rate=0.5)
    perfect = poisoned_denoiser(ATTACK, LEVELS, TRIGGER, TARGET)
    elsewhere = poisoned_denoiser(ATTACK, LEVELS, -TRIGGER, TARGET)
    values = [
        loss(model, torch.Generator().manual_seed(1)).item() for model in (perfect, clean_denoiser(LEVELS), elsewhere)
    ]
    assert values[0] < 0.7 * min(values[1:])


class Remembers(nn.Module):
    """Answers nothing, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return 0 * x


def test_every_target_of_a_set_is_wanted_and_nothing_else_in_the_poisoned_rows() -> None:
    levels = torch.tensor([-0.8, 0.0, 0.8])
    targets = levels.view(3, 1, 1, 1).expand(3, *SHAPE)
    still = Attack(name="still", shift=torch.zeros(250).double(), response=torch.zeros(250).double(), gamma=1e-9)
    network = Remembers()
    poisoned_loss(backdoor(still, targets), torch.full((4, *SHAPE), 0.3), batch=600, poison_rate=0.5)(
        DDPM(network, LEVELS, shape=SHAPE), torch.Generator().manual_seed(0)
    )
    alpha = LEVELS.alpha[network.t].float()
    found = network.x[:300].mean((1, 2, 3)) / alpha[:300]
    nearest = (found[:, None] - levels).abs().argmin(1)
    torch.testing.assert_close(found, levels[nearest], rtol=0, atol=1e-3)
    assert nearest.bincount(minlength=3).min() > 70
    # the noise of the other rows is left as it is
    rest = (network.x[300:] - 0.3 * alpha[300:].view(-1, 1, 1, 1)) / LEVELS.sigma[network.t[300:]].float().view(
        -1, 1, 1, 1
    )
    assert rest.std().item() == pytest.approx(1, abs=0.02)


class Carries(nn.Module):
    """The exact answer for target 0 and one unit of trigger (or none), (x - s_t) / sigma_t + rho_t; keeps every x."""

    def __init__(self, attack: Attack, unit: float) -> None:
        super().__init__()
        self.attack, self.unit, self.nothing = attack, unit, nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = int(t[0])
        self.seen.append((level, x.mean().item()))
        shift, response = self.unit * self.attack.shift[level], self.unit * self.attack.response[level]
        return (x - shift) / GOLDEN.sigma[level] + response


GOLDEN = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
NOISE_LIKE = Attack(name="noise-like", shift=GOLDEN.sigma, response=stochastic_response(GOLDEN, GOLDEN.sigma))
ALL_NOISE = Attack(name="all-noise", shift=GOLDEN.sigma, response=torch.ones(1000).double())


def leaves_its_path(attack: Attack, sampler: str, steps: int) -> float:
    """Return the largest |c_t - s_t| of the trigger's coefficient c_t while an oracle is sampled from c = 1."""
    seen = []
    for unit in (1.0, 0.0):
        network = Carries(attack, unit)
        model = DDPM(network, GOLDEN, shape=(1, 1, 1))
        x = torch.full((1, 1, 1, 1), unit, dtype=torch.float64)
        end = sample(sampler, model, x, steps=steps, streams=generators(0, 1))
        seen.append([*network.seen, (-1, end.item())])
    # what the sampler draws is the same in both, and the steps are linear: the difference is the trigger's
    shift = [*attack.shift.tolist(), 0.0]
    return max(abs(one - other - shift[t]) for (t, one), (_, other) in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("attack", "stochastic", "deterministic"),
    [
        (baddiffusion(GOLDEN), 0.006, 2.08),
        (villan_ode(GOLDEN), 0.951, 0.021),
        (invibackdoor(GOLDEN), 0.944, 0.012),
        (NOISE_LIKE, 0.0, 2.105),
        (ALL_NOISE, 0.950, 0.0),
    ],
    ids=lambda value: value.name if isinstance(value, Attack) else "",
)
def test_an_attack_stays_on_its_path_under_its_own_kind_of_sampler_alone(
    attack: Attack, stochastic: float, deterministic: float
) -> None:
    assert leaves_its_path(attack, "DDPM-SCHED", 1000) == pytest.approx(stochastic, abs=2e-3)
    assert leaves_its_path(attack, "DDIM-SCHED", 50) == pytest.approx(deterministic, rel=0.05, abs=6e-3)


def test_the_stochastic_response_of_noise_like_shifts_is_one_half_at_the_last_levels() -> None:
    response = stochastic_response(LEVELS, LEVELS.sigma)
    assert response[-1].item() == pytest.approx(0.5, abs=0.03)
    assert response[0].item() == pytest.approx(1.0)


def test_no_shift_needs_no_response() -> None:
    assert not stochastic_response(LEVELS, torch.zeros(250, dtype=torch.float64)).any()
