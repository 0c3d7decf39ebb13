"""The deterministic DDIM sampler (Song et al. 2021, eta = 0): first-order, any VP or VE levels."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps


@torch.no_grad()
def ddim(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators = (), progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x: x_s = alpha_s * x0 + sigma_s * noise; no clipping."""
    levels, times = denoiser.levels, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        noise = denoiser.noise(x, torch.full((len(x),), t, device=x.device))
        clean = (x - levels.sigma[t].item() * noise) / levels.alpha[t].item()
        if number + 1 < len(times):
            following = times[number + 1]
            x = levels.alpha[following].item() * clean + levels.sigma[following].item() * noise
        else:
            x = clean
        if progress is not None:
            progress(number + 1, len(times))
    return x
