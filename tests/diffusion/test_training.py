"""Fine-tuning: what it learns, and that it leaves a frozen, finite, reproducible network."""

from __future__ import annotations

import pytest
import torch
from analytic import PROCESSES, SHAPE, levels_of, perfect_of, small_denoiser, small_of, vp_levels
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.training import consistency_loss, diffusion_loss, fine_tune, ordinary_loss, path_loss

# A_t of the one level, and the variance of the data: signal and noise are equally large there
SIGNAL, VARIANCE = 0.0099, 100.0


class Scaled(nn.Module):
    """Answers factor * x: the best linear network for centred data has factor sigma / (alpha^2 v + sigma^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


def trained(**options: float) -> float:
    levels = Levels.variance_preserving(torch.tensor([SIGNAL]))
    denoiser = DDPM(Scaled(), levels, shape=(1, 4, 4))
    data = VARIANCE**0.5 * torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    list(fine_tune(denoiser, diffusion_loss(data, 64), generator=generator, **options))  # type: ignore[arg-type]
    return float(denoiser.network.factor)


@pytest.mark.parametrize("extra", [{}, {"warmup": 20, "decay": True}, {"ema": 0.9}])
def test_training_finds_the_wiener_filter(extra: dict[str, float]) -> None:
    expected = (1 - SIGNAL) ** 0.5 / (SIGNAL * VARIANCE + 1 - SIGNAL)
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


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_the_perfect_answer_of_every_family_has_the_least_loss(process: str) -> None:
    data = 0.5 * torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(0))
    perfect, narrow, wide = (
        diffusion_loss(data, 1000)(perfect_of(process, variance=variance), torch.Generator().manual_seed(1)).item()
        for variance in (0.25, 0.05, 1.0)
    )
    assert perfect < 0.97 * min(narrow, wide)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_ordinary_loss_is_that_of_the_family(process: str) -> None:
    data = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(0))
    denoiser = small_of(process)
    ordinary, diffusion, consistency = (
        loss(data, 8)(denoiser, torch.Generator().manual_seed(1)).item()
        for loss in (ordinary_loss, diffusion_loss, consistency_loss)
    )
    assert ordinary == (consistency if process == "consistency" else diffusion)
    assert diffusion != pytest.approx(consistency, rel=1e-3)


class Ends(ConsistencyModel):
    """A consistency model that answers `end` [N, C, H, W] for every point of a path, or for each level another.

    It remembers where it was asked.
    """

    def __init__(self, end: Tensor, levels: Levels, agrees: bool = True) -> None:
        super().__init__(nn.Linear(1, 1), levels, shape=SHAPE)
        self.end, self.agrees, self.asked = end, agrees, list[tuple[Tensor, Tensor]]()

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return self.end if self.agrees else self.end * t.view(-1, 1, 1, 1)


def paths(model: ConsistencyModel, count: int) -> float:
    x0, eps = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return path_loss(model, x0, eps, torch.Generator().manual_seed(1)).item()


def test_the_two_points_of_a_path_share_the_noise_and_their_distance_is_that_of_consistency_tuning() -> None:
    levels = levels_of("consistency", 2000)
    x0, eps = torch.randn(2, 4000, *SHAPE, generator=torch.Generator().manual_seed(0))
    model = Ends(x0, levels)
    paths(model, 4000)
    (early, before), (late, t) = model.asked
    sigma, sigma_before = levels.sigma[t], levels.sigma[before]
    assert (before < t).all()
    for x, index in ((early, before), (late, t)):
        torch.testing.assert_close(x, model.diffuse(x0, index, eps))
    # exp(-1.1 + 2 n), of which the levels from .002 to 80 cut off next to nothing
    assert sigma.log().mean().item() == pytest.approx(-1.1, abs=0.1)
    assert sigma.log().std().item() == pytest.approx(2.0, abs=0.1)
    wide = sigma > 0.05  # where the levels are dense enough for what is asked
    expected = sigma * (1 - (1 + 8 * torch.sigmoid(-sigma)) / 8)
    gap = (sigma_before - expected) / sigma
    assert gap[wide].abs().max() < 0.02
    assert (sigma_before <= expected.clamp(min=levels.sigma[0].item()) * (1 + 1e-9))[wide].all()


def test_paths_with_one_end_have_no_loss_and_others_have() -> None:
    levels = levels_of("consistency", 80)
    # only the 1e-3 under the root is left of equal ends, times 1 / (sigma - sigma')
    equal, unequal = (paths(Ends(torch.ones(500, *SHAPE), levels, agrees), 500) for agrees in (True, False))
    assert equal < 0.15 < 10 < unequal


def test_only_the_later_point_of_a_path_is_trained() -> None:
    denoiser = small_of("consistency")
    denoiser.network.requires_grad_(True)
    x0, eps = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    path_loss(denoiser, x0, eps, torch.Generator().manual_seed(1)).backward()  # type: ignore[no-untyped-call]
    seen = denoiser.network.time.weight.grad.abs().sum(1).nonzero().flatten()
    assert 1 <= len(seen) <= 4
