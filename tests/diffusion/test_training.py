"""Fine-tuning: what it learns, and that it leaves a frozen, finite, reproducible network."""

from __future__ import annotations

import pytest
import torch
from analytic import small_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.training import diffusion_loss, fine_tune


class Scaled(nn.Module):
    """Answers factor * x: the best linear network for centred data has factor sigma / (alpha^2 v + sigma^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


def trained(**options: float) -> float:
    levels = Levels.variance_preserving(torch.tensor([0.5]))
    denoiser = DDPM(Scaled(), levels, shape=(1, 4, 4))
    data = 0.5 * torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    list(fine_tune(denoiser, diffusion_loss(data, 64), generator=generator, **options))  # type: ignore[arg-type]
    return float(denoiser.network.factor)


@pytest.mark.parametrize("extra", [{}, {"warmup": 20, "decay": True}, {"ema": 0.9}])
def test_training_finds_the_wiener_filter(extra: dict[str, float]) -> None:
    expected = 0.5**0.5 / (0.5 * 0.25 + 0.5)
    assert trained(steps=200, learning_rate=0.05, **extra) == pytest.approx(expected, abs=0.05)


def test_no_steps_learn_nothing() -> None:
    assert trained(steps=0, learning_rate=0.05) == 0


def test_warmup_and_average_slow_the_start() -> None:
    plain, warm, averaged = (
        trained(steps=3, learning_rate=0.05, **extra) for extra in ({}, {"warmup": 9}, {"ema": 0.9})
    )
    assert 0 < warm < plain
    assert 0 < averaged < plain


def test_the_same_generator_trains_the_same_network() -> None:
    assert trained(steps=5, learning_rate=0.05) == trained(steps=5, learning_rate=0.05)


def test_the_network_is_frozen_afterwards() -> None:
    denoiser = small_denoiser(vp_levels(50))
    losses = fine_tune(
        denoiser,
        diffusion_loss(torch.zeros(4, *denoiser.shape), 2),
        steps=2,
        learning_rate=1e-3,
        generator=torch.Generator().manual_seed(0),
    )
    next(losses)
    assert denoiser.network.training
    assert len(list(losses)) == 1
    assert not denoiser.network.training
    assert not any(parameter.requires_grad for parameter in denoiser.network.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(bad: float) -> None:
    denoiser = small_denoiser(vp_levels(50))

    def loss(model: Denoiser, generator: torch.Generator) -> Tensor:
        return torch.tensor(bad, requires_grad=True)

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(FloatingPointError, match="at step 0"):
        list(fine_tune(denoiser, loss, steps=2, learning_rate=1e-3, generator=generator))
