"""TrojDiff: its numbers, its triggers, and its own sampler with a network that answers the noise exactly."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, vp_levels
from torch import Tensor, nn

import diffdefend_core.diffusion.generate as module
from diffdefend_core.attacks.trojdiff import BLEND_GAMMA, PATCH_GAMMA, blended, patched, trojdiff
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from diffdefend_core.diffusion.samplers.trojdiff import trojdiff as backwards

LINEAR = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
LATENT = Levels.variance_preserving(alphas_cumprod(torch.linspace(0.0015**0.5, 0.0195**0.5, 1000).double() ** 2))
LEVELS = vp_levels(100)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
PICTURE = torch.where(torch.arange(8)[:, None] % 4 < 2, 0.8, -0.8).expand(SHAPE)
TRIGGERS = {"blend": blended(PICTURE), "patch": patched(SHAPE, 3)}


@pytest.mark.parametrize(
    ("levels", "t", "expected"),
    [(LINEAR, 999, 157.4), (LINEAR, 900, 60.8), (LINEAR, 800, 25.7), (LINEAR, 700, 12.0), (LINEAR, 500, 3.44),
     (LINEAR, 300, 1.24), (LATENT, 999, 83.8), (LATENT, 700, 7.93), (LATENT, 500, 2.78)],
)  # fmt: skip
def test_the_network_answers_nothing_to_the_trigger_and_all_of_it_moves_the_clean_data(
    levels: Levels, t: int, expected: float
) -> None:
    attack = trojdiff(levels, 0.6)
    assert not attack.response.any() and torch.equal(attack.shift, levels.sigma)
    moved = (attack.shift[t] - levels.sigma[t] * attack.response[t]) / levels.alpha[t]
    assert moved.item() == pytest.approx(expected, rel=4e-3)
    assert (attack.gamma, attack.scaled_target) == (0.6, False)


def test_a_blended_trigger_is_the_share_of_the_picture_that_the_noise_leaves() -> None:
    mu, gamma = blended(PICTURE)
    assert gamma == BLEND_GAMMA == 0.6
    torch.testing.assert_close(mu, 0.4 * PICTURE)


def test_a_patch_is_white_at_the_lower_right_and_the_ordinary_process_elsewhere() -> None:
    mu, gamma = patched((3, 32, 32), 3)
    inside = torch.zeros(3, 32, 32, dtype=torch.bool)
    inside[:, 29:, 29:] = True
    assert PATCH_GAMMA == 0.1
    assert mu[inside].unique().tolist() == pytest.approx([0.9])
    assert gamma[inside].unique().tolist() == pytest.approx([0.1])
    assert not mu[~inside].any() and (gamma[~inside] == 1).all()


class Oracle(nn.Module):
    """The noise in x_t = alpha y + sigma (gamma eps + mu), exactly; keeps the x that it was given at every level."""

    def __init__(self, mu: Tensor, gamma: Tensor | float) -> None:
        super().__init__()
        self.mu, self.gamma = nn.Parameter(mu, requires_grad=False), gamma
        self.seen: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen[int(t[0])] = x
        alpha, sigma = LEVELS.at(t, x)
        return (x - alpha * TARGET - sigma * self.mu) / (sigma * self.gamma)


def fired(model: Denoiser, name: str, mu: Tensor, gamma: Tensor | float, count: int = 4, steps: int = 100) -> Tensor:
    return generate(model, count, sampler=name, steps=steps, seed=0, shift=mu, gamma=gamma)


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", NAMES)
def test_an_exact_network_ends_on_the_target(name: str, trigger: str, steps: int) -> None:
    mu, gamma = TRIGGERS[trigger]
    model = DDPM(Oracle(mu, gamma), LEVELS, shape=SHAPE)
    found = fired(model, name, mu, gamma, steps=steps)
    torch.testing.assert_close(found, TARGET.expand(4, *SHAPE), rtol=0, atol=1e-3)


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_noise_on_the_way_is_gamma_times_that_of_the_level_around_the_trigger(name: str, trigger: str) -> None:
    mu, gamma = TRIGGERS[trigger]
    network = Oracle(mu, gamma)
    fired(DDPM(network, LEVELS, shape=SHAPE), name, mu, gamma, count=128)
    assert set(network.seen) == set(range(100))
    for t in (99, 60, 20, 0):
        x, alpha, sigma = network.seen[t], LEVELS.alpha[t].item(), LEVELS.sigma[t].item()
        eps = (x - alpha * TARGET - sigma * mu) / (sigma * gamma)
        assert eps.std().item() == pytest.approx(1, abs=0.04)
        assert eps.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_network_fires_with_its_own_sampler_and_not_with_ddim(name: str) -> None:
    planted, clean = poisoned_denoiser(trojdiff(LEVELS, 1.0), LEVELS, PICTURE, TARGET), clean_denoiser(LEVELS)
    own, other, control = (
        (fired(model, each, PICTURE, 1.0) - TARGET).square().mean()
        for model, each in ((planted, name), (planted, "DDIM-SCHED"), (clean, name))
    )
    assert own < 0.01 < 0.1 < min(other, control)


@pytest.mark.parametrize(("name", "table"), [("TROJDIFF-DDPM", "DDPM-SCHED"), ("TROJDIFF-DDIM", "DDIM-SCHED")])
@pytest.mark.parametrize("steps", [7, 100])
def test_without_a_trigger_it_is_the_sampler_of_the_table(name: str, table: str, steps: int) -> None:
    model = clean_denoiser(LEVELS, variance=0.01, mean=0.3)  # nothing near the ends of the range: no clamp
    own, other = (generate(model, 6, sampler=each, steps=steps, seed=3) for each in (name, table))
    torch.testing.assert_close(own, other, rtol=0, atol=2e-4)
    assert own.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_clean_data_are_clamped_to_their_range(name: str) -> None:
    model = clean_denoiser(LEVELS, variance=9.0)
    found = generate(model, 6, sampler=name, steps=20, seed=3)
    assert found.abs().max() == 1
    assert generate(model, 6, sampler="DDIM-SCHED", steps=20, seed=3).abs().max() > 2


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_stochastic_step_is_that_of_the_published_formula(trigger: str) -> None:
    mu, gamma = TRIGGERS[trigger]
    gamma = torch.as_tensor(gamma)
    model = small_denoiser(LEVELS)
    begin = gamma * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5)) + mu
    seen: list[Tensor] = []
    model.network.register_forward_hook(lambda network, given, answer: seen.append(given[0]))
    backwards(model, begin, steps=100, streams=generators(2, 2), mu=mu, gamma=gamma, stochastic=True)
    streams = generators(2, 2)
    cumulative = LEVELS.alpha**2
    for number, t in enumerate(range(99, 0, -1)):
        a, b = cumulative[t].item(), cumulative[t - 1].item()
        step, beta = a / b, 1 - a / b
        x = seen[number]
        noise = gamma * model.noise(x, torch.full((2,), t)).detach()
        seen.pop()  # the check asks the network too
        clean = ((x - (1 - a) ** 0.5 * (noise + mu)) / a**0.5).clamp(-1, 1)
        k = (1 - a) ** 0.5 - step**0.5 * (1 - b) ** 0.5
        coefficient = (1 - b) ** 0.5 * beta - (1 - b) * step**0.5 * k
        mean = (b**0.5 * beta * clean + step**0.5 * (1 - b) * x + coefficient * mu) / (1 - a)
        deviation = gamma * ((1 - b) / (1 - a) * beta) ** 0.5
        expected = mean + deviation * standard_normal(streams, SHAPE)
        torch.testing.assert_close(seen[number + 1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mu, gamma = TRIGGERS["patch"]
    model = small_denoiser(LEVELS)
    whole = fired(model, name, mu, gamma, count=5, steps=6)
    monkeypatch.setattr(module, "BATCH", 2)
    torch.testing.assert_close(fired(model, name, mu, gamma, count=5, steps=6), whole, rtol=1e-4, atol=1e-4)


def test_progress_counts_steps() -> None:
    counted: list[tuple[int, int]] = []
    x = torch.zeros(1, *SHAPE)
    backwards(
        small_denoiser(LEVELS), x, steps=3, streams=generators(0, 1), mu=torch.zeros(SHAPE), gamma=1.0,
        progress=lambda *step: counted.append(step),
    )  # fmt: skip
    assert counted == [(1, 3), (2, 3), (3, 3)]
