"""Multistep sampling of consistency models (Song et al. 2023, algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps

MIDDLE_SIGMA = 0.821


def step_levels(levels: Levels, steps: int) -> list[int]:
    """Return the level indices of the steps, descending. Raises ValueError unless 1 <= steps <= levels."""
    times = trailing_steps(len(levels), steps)
    if steps == 2:
        times[1] = int((levels.sigma.log() - math.log(MIDDLE_SIGMA)).abs().argmin())
    return times


@torch.no_grad()
def consistency(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x: x0 = f(x, sigma_t) at each level of the steps.

    To the next level it goes by fresh noise: x = x0 + sqrt(sigma_s^2 - sigma_0^2) * z, with sigma_0 the first level,
    which f leaves as it is. One step draws no noise. The second of two steps is at the level nearest to sigma = 0.821,
    as in consistency tuning (algorithms.md 1.6): higher up it would paint the picture anew.
    """
    sigmas, times = denoiser.levels.sigma, step_levels(denoiser.levels, steps)
    for number, t in enumerate(times):
        if number > 0:
            spread = (sigmas[t] ** 2 - sigmas[0] ** 2).sqrt().item()
            x = x + spread * standard_normal(streams, denoiser.shape, x.device)
        x = denoiser.x0(x, torch.full((len(x),), t, device=x.device))
        if progress is not None:
            progress(number + 1, len(times))
    return x
