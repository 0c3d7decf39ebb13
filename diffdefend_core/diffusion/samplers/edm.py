"""The samplers of EDM for VE models: Heun's method with and without churn (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, standard_normal
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps

# S_churn, S_min, S_max and S_noise with which VillanDiffusion samples
CHURN = 100.0
CHURNED = (0.05, 50.0)
NOISE_SCALE = 1.007


def edm_ve_sde(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] by stochastic Heun steps (Karras et al. 2022, algorithm 2): 2 steps - 1 calls.

    Before each step at a level of `CHURNED`, fresh noise lifts x from sigma to sigma' = (1 + g) * sigma with
    g = min(CHURN / steps, sqrt(2) - 1): x + sqrt(sigma'^2 - sigma^2) * NOISE_SCALE * z. Then a Heun step from sigma'.
    """
    return _heun(denoiser, x, steps=steps, streams=streams, progress=progress, churn=CHURN)


def edm_ve_ode(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators = (), progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] by Heun's method (Karras et al. 2022, algorithm 1): 2 steps - 1 network calls.

    The ODE is dx / dsigma = (x - x0) / sigma = noise; each step but the last averages the slopes at both of its ends.
    """
    return _heun(denoiser, x, steps=steps, streams=streams, progress=progress, churn=0.0)


@torch.no_grad()
def _heun(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None, churn: float
) -> Tensor:
    """Run algorithm 2 on the model's own levels: for geometric ones the VE time steps of its table 1.

    The lifted sigma' is the nearest level (the `round_sigma` of EDM). KarrasVeScheduler of diffusers takes the same
    steps, but its schedule holds sigma^2 where sigma is meant, so that it starts at sigma_max^2.
    """
    sigmas, times = denoiser.levels.sigma, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        lifted = _lifted(sigmas, t, min(churn / steps, 2**0.5 - 1))
        sigma, high = sigmas[t].item(), sigmas[lifted].item()
        if churn:
            spread = NOISE_SCALE * (high**2 - sigma**2) ** 0.5
            x = x + spread * standard_normal(streams, denoiser.shape, x.device)
        slope = denoiser.noise(x, torch.full((len(x),), lifted, device=x.device))
        if number + 1 < len(times):
            following = times[number + 1]
            step = sigmas[following].item() - high
            ahead = denoiser.noise(x + step * slope, torch.full((len(x),), following, device=x.device))
            x = x + step * (slope + ahead) / 2
        else:
            x = x - high * slope
        if progress is not None:
            progress(number + 1, len(times))
    return x


def _lifted(sigmas: Tensor, t: int, gain: float) -> int:
    """Return the level nearest to (1 + gain) * sigma_t, or t outside of `CHURNED`."""
    low, high = CHURNED
    if not low <= sigmas[t] <= high:
        return t
    return int((sigmas - (1 + gain) * sigmas[t]).abs().argmin())
