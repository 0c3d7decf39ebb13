"""Images from a model: plain, or with a shift of the initial noise."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import Progress, sample
from diffdefend_core.diffusion.samplers.trojdiff import NAMES, TROJDIFF_DDPM, trojdiff

BATCH = 128


def generate(
    denoiser: Denoiser,
    count: int,
    *,
    sampler: str,
    steps: int,
    seed: int,
    shift: Tensor | None = None,
    gamma: Tensor | float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Return `count` samples [N, C, H, W] in the model's own space, on the CPU.

    The initial state is levels.initial_scale * (gamma * eps + shift), with shift [C, H, W] in units of the initial
    noise. `sampler` may also be TROJDIFF-DDPM or TROJDIFF-DDIM, which are told shift and gamma.
    Sample i depends on (seed, i) alone, so that batches change nothing. Raises InputError for a sampler that does not
    fit the model.
    """
    parts = []
    for start in range(0, count, BATCH):
        streams = generators(seed, min(BATCH, count - start), start)
        noise = standard_normal(streams, denoiser.shape, denoiser.device)
        noise = torch.as_tensor(gamma).to(noise) * noise
        if shift is not None:
            noise = noise + shift.to(noise)
        state = noise * denoiser.levels.initial_scale
        if sampler in NAMES and denoiser.process == "vp":
            mu = shift if shift is not None else torch.zeros(denoiser.shape)
            stochastic = sampler == TROJDIFF_DDPM
            images = trojdiff(denoiser, state, steps=steps, streams=streams, mu=mu, gamma=gamma, stochastic=stochastic)
        else:
            images = sample(sampler, denoiser, state, steps=steps, streams=streams)
        parts.append(images.cpu())
        if progress is not None:
            progress(min(start + BATCH, count), count)
    return torch.cat(parts)
