"""TrojDiff's own reverse process: sampling where the noise is gamma * eps + mu (algorithms.md 1.2).

Not in the table: it takes the trigger. It shows whether a network was trained on a biased noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps

TROJDIFF_DDPM, TROJDIFF_DDIM = "TROJDIFF-DDPM", "TROJDIFF-DDIM"
NAMES = (TROJDIFF_DDPM, TROJDIFF_DDIM)


@torch.no_grad()
def trojdiff(
    denoiser: Denoiser,
    x: Tensor,
    *,
    steps: int,
    streams: Generators,
    mu: Tensor,
    gamma: Tensor | float,
    stochastic: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Return samples [N, C, H, W] from x = gamma * eps + mu, with mu [C, H, W] and gamma a number or [C, H, W].

    With e the network's answer, z = x_t - sigma_t mu = alpha_t x0 + sigma_t gamma e is an ordinary process whose noise
    is scaled: x0 = (z - sigma_t gamma e) / alpha_t, clamped to the clean range, then a DDIM step or, if `stochastic`,
    a draw from the posterior with its deviation times gamma.
    """
    mu, gamma = mu.to(x), torch.as_tensor(gamma).to(x)
    levels, times = denoiser.levels, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        alpha, sigma = levels.alpha[t].item(), levels.sigma[t].item()
        noise = gamma * denoiser.noise(x, torch.full((len(x),), t, device=x.device))
        z = x - sigma * mu
        clean = (z - sigma * noise) / alpha
        if denoiser.clean_range is not None:
            clean = clean.clamp(*denoiser.clean_range)
        if number + 1 == len(times):
            x = clean
        else:
            following = times[number + 1]
            alpha_s, sigma_s = levels.alpha[following].item(), levels.sigma[following].item()
            if stochastic:
                ratio = alpha / alpha_s
                variance = (sigma**2 - (ratio * sigma_s) ** 2) * sigma_s**2 / sigma**2
                z = alpha_s * clean + (sigma_s**2 - variance) ** 0.5 * (z - alpha * clean) / sigma
                z = z + variance**0.5 * gamma * standard_normal(streams, denoiser.shape, x.device)
            else:
                z = alpha_s * clean + sigma_s * noise
            x = z + sigma_s * mu
        if progress is not None:
            progress(number + 1, len(times))
    return x
