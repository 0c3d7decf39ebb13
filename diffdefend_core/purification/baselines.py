"""What ours is compared with: Elijah's removal and plain fine-tuning. Both need real data; the gate uses neither.

Source: Elijah (An et al., AAAI 2024), its released code as algorithms.md 2.1 describes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import Loss, fine_tune, ordinary_loss


@dataclass(frozen=True)
class Schedule:
    """How long and how hot a baseline trains: Elijah's, for BadDiffusion on CIFAR-10."""

    steps: int = 517
    warmup: int = 500
    learning_rate: float = 2e-4
    batch: int = 128


def elijah_removal(
    suspect: Denoiser,
    trigger: Tensor,
    data: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[Denoiser, int]:
    """Return a copy of `suspect` after Elijah's removal of `trigger` [C, H, W], and the evaluations spent.

    L = L_clean + ||M(eps + tau) - M_f(eps)||^2 + ||M(eps) - M_f(eps)||^2, the last two at the noisiest level alone, on
    raw network outputs: scores, for a model that predicts them. `data` [M, C, H, W] are real rows in the space of x0.
    """
    clean, last = ordinary_loss(data, schedule.batch), len(suspect.levels) - 1
    scale = suspect.levels.initial_scale
    raw = 1 / suspect.levels.sigma[last].item() if suspect.process == "ve" else 1.0

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        eps = torch.randn((schedule.batch, *suspect.shape), generator=generator).to(suspect.device)
        t = torch.full((schedule.batch,), last, device=eps.device)
        with torch.no_grad():
            frozen = raw * suspect.noise(scale * eps, t)
        removed = raw * denoiser.noise(scale * (eps + trigger.to(eps)), t) - frozen
        kept = raw * denoiser.noise(scale * eps, t) - frozen
        return clean(denoiser, generator) + removed.square().mean() + kept.square().mean()

    repaired = _trained(suspect, loss, schedule, seed, progress)
    return repaired, schedule.steps * schedule.batch * (3 * 3 + 1)


def plain_fine_tuning(
    suspect: Denoiser, data: Tensor, schedule: Schedule, *, seed: int, progress: Callable[[int, int], None]
) -> tuple[Denoiser, int]:
    """Return a copy of `suspect` after training on `data` [M, C, H, W] alone, and the evaluations spent."""
    repaired = _trained(suspect, ordinary_loss(data, schedule.batch), schedule, seed, progress)
    return repaired, schedule.steps * schedule.batch * 3


def _trained(
    suspect: Denoiser, loss: Loss, schedule: Schedule, seed: int, progress: Callable[[int, int], None]
) -> Denoiser:
    repaired = suspect.clone()
    steps = fine_tune(
        repaired,
        loss,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        generator=torch.Generator().manual_seed(seed),
        warmup=schedule.warmup,
    )
    for number, _ in enumerate(steps):
        progress(number + 1, schedule.steps)
    return repaired
