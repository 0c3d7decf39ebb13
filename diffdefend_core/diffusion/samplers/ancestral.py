"""The stochastic ancestral sampler of DDPM (Ho et al. 2020, algorithm 2), with respaced steps."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps


@torch.no_grad()
def ddpm(denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x [N, C, H, W]; x0 is never clipped.

    Each step draws from q(x_s | x_t, x0) with x0 predicted: with a = alpha_t / alpha_s and
    beta = sigma_t^2 - a^2 sigma_s^2, the mean is (x - beta / sigma_t * noise) / a and the variance
    beta * sigma_s^2 / sigma_t^2. `streams` holds one generator per sample.
    """
    levels, times = denoiser.levels, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        noise = denoiser.noise(x, torch.full((len(x),), t, device=x.device))
        following = times[number + 1] if number + 1 < len(times) else None
        alpha, sigma = levels.alpha[t].item(), levels.sigma[t].item()
        alpha_s, sigma_s = (
            (levels.alpha[following].item(), levels.sigma[following].item()) if following is not None else (1.0, 0.0)
        )
        ratio = alpha / alpha_s
        beta = sigma**2 - (ratio * sigma_s) ** 2
        x = (x - beta / sigma * noise) / ratio
        if following is not None:
            x = x + (beta**0.5 * sigma_s / sigma) * standard_normal(streams, denoiser.shape, x.device)
        if progress is not None:
            progress(number + 1, len(times))
    return x
