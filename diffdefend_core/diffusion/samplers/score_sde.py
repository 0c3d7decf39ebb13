"""The predictor-corrector sampler of score-based SDEs for VE models (Song et al. 2021, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps

# the signal-to-noise ratio with which VillanDiffusion samples NCSN on 32 x 32 pixels
SNR = 0.075


@torch.no_grad()
def score_sde_ve(
    denoiser: Denoiser,
    x: Tensor,
    *,
    steps: int,
    streams: Generators,
    progress: Progress | None = None,
    snr: float = SNR,
) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x [N, C, H, W] of a VE model: two network calls per step.

    At each level one Langevin correction (`langevin`), then the reverse diffusion to the level below: with
    v = sigma_t^2 - sigma_s^2, x_s = x_t + v * score + sqrt(v) * z; the last step returns the mean. The score is
    -noise / sigma_t. It is our own code because the scheduler of diffusers averages the norms of the corrector over the
    batch, so that a sample would depend on its neighbours.
    """
    sigmas, times = denoiser.levels.sigma, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        last, sigma = number + 1 == len(times), sigmas[t].item()
        index = torch.full((len(x),), t, device=x.device)
        score = -denoiser.noise(x, index) / sigma
        x = langevin(x, score, standard_normal(streams, denoiser.shape, x.device), snr)
        variance = sigma**2 - (0.0 if last else sigmas[times[number + 1]].item() ** 2)
        x = x - variance / sigma * denoiser.noise(x, index)
        if not last:
            x = x + variance**0.5 * standard_normal(streams, denoiser.shape, x.device)
        if progress is not None:
            progress(number + 1, len(times))
    return x


def langevin(x: Tensor, score: Tensor, z: Tensor, snr: float) -> Tensor:
    """Return x + h * score + sqrt(2 h) * z, all [N, C, H, W], with h = 2 (snr * |z| / |score|)^2 for each sample.

    Song et al. 2021, algorithm 4; the norms are those of one sample.
    """
    noise_norm, score_norm = (torch.linalg.vector_norm(part, dim=(1, 2, 3), keepdim=True) for part in (z, score))
    size: Tensor = 2 * (snr * noise_norm / score_norm) ** 2
    return x + size * score + (2 * size).sqrt() * z
