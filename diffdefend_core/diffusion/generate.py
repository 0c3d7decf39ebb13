"""Images from a model: plain, or with a shift of the initial noise."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS, Progress

BATCH = 128


def generate(
    denoiser: Denoiser,
    count: int,
    *,
    sampler: str,
    steps: int,
    seed: int,
    shift: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return `count` samples [N, C, H, W] in the model's own space, on the CPU.

    The initial state is sigma_T * (eps + shift), with shift [C, H, W] in units of the initial noise. Sample i depends
    on (seed, i) alone, so that batches change nothing.
    """
    parts = []
    for start in range(0, count, BATCH):
        streams = generators(seed, min(BATCH, count - start), start)
        noise = standard_normal(streams, denoiser.shape, denoiser.device)
        if shift is not None:
            noise = noise + shift.to(noise)
        scale = denoiser.levels.sigma[-1].item()
        state = noise * (scale if scale > 1 else 1.0)
        parts.append(SAMPLERS[sampler](denoiser, state, steps=steps, streams=streams).cpu())
        if progress is not None:
            progress(min(start + BATCH, count), count)
    return torch.cat(parts)


def steps_for(denoiser: Denoiser, wanted: int) -> int:
    """Return `wanted` sampling steps, or all levels of a model that has fewer."""
    return min(wanted, len(denoiser.levels))
