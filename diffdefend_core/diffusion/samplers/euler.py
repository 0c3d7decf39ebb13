"""The deterministic Euler sampler of rectified flow and flow matching (Liu et al. 2023, Lipman et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps


@torch.no_grad()
def euler(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators = (), progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] from the initial state x: x_s = x_t + (s - t) * velocity (Liu et al. 2023, eq. 1).

    The velocity is (x_t - x0) / t, so that x_s = s / t * x_t + (1 - s / t) * x0: it is defined at t = 1, where the
    noise says nothing about x0, and the last step, to s = 0, returns x0.
    """
    moments, times = denoiser.levels.sigma, trailing_steps(len(denoiser.levels), steps)
    for number, t in enumerate(times):
        clean = denoiser.x0(x, torch.full((len(x),), t, device=x.device))
        following = moments[times[number + 1]].item() if number + 1 < len(times) else 0.0
        share = following / moments[t].item()
        x = share * x + (1 - share) * clean
        if progress is not None:
            progress(number + 1, len(times))
    return x
