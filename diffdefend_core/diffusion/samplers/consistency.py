"""Multistep sampling of consistency models (Song et al. 2023, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps


@torch.no_grad()
def consistency(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x: x0 = f(x, sigma_t) at each level of the steps.

    To the next level it goes by fresh noise: x = x0 + sqrt(sigma_s^2 - sigma_0^2) * z, with sigma_0 the first level,
    which f leaves as it is. One step draws no noise.
    """
    sigmas, times = denoiser.levels.sigma, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        if number > 0:
            spread = (sigmas[t] ** 2 - sigmas[0] ** 2).sqrt().item()
            x = x + spread * standard_normal(streams, denoiser.shape, x.device)
        x = denoiser.x0(x, torch.full((len(x),), t, device=x.device))
        if progress is not None:
            progress(number + 1, len(times))
    return x
