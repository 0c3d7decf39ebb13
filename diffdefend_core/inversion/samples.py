"""The suspect's own samples, from which everything else is made: no real data is needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.response import levels_at, rms
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.errors import ModelRejectedError

ONE_PICTURE = 1e-6  # own samples closer than this, in the units of x0, differ by rounding


def own_samples(
    denoiser: Denoiser, count: int, steps: int, seed: int, progress: Callable[[str, int, int], None]
) -> Tensor:
    """Return `count` of the model's own samples [N, C, H, W] on its device, clamped to its clean range.

    Raises FloatingPointError if they are not finite.
    """
    sampler = usual(denoiser)
    samples = generate(
        denoiser,
        count,
        sampler=sampler.name,
        steps=steps_for(denoiser, sampler, steps),
        seed=seed,
        progress=lambda done, total: progress("own samples", done, total),
    )
    if not torch.isfinite(samples).all():
        raise FloatingPointError("the model's own samples are not finite")
    if denoiser.clean_range is not None:
        samples = samples.clamp(*denoiser.clean_range)
    return samples.to(denoiser.device)


@torch.no_grad()
def check_samples(suspect: Denoiser, samples: Tensor, worst: float, seed: int) -> int:
    """Raise if there is nothing in the suspect that a search could judge; return what that cost.

    FloatingPointError if its own `samples` [N, C, H, W] are all one picture; ModelRejectedError if it is no denoiser of
    them. Where signal and noise are alike (alpha = sigma), its error must be below `worst` times the smallest error
    that a multiple of the input can have: a network that has learnt nothing of its pictures keeps both laws.
    """
    if rms(samples - samples.mean(0)).item() < ONE_PICTURE:
        raise FloatingPointError("the model's own samples are all one picture")
    level = levels_at(suspect.levels, (1.0,))[0]
    t = torch.full((len(samples),), level, device=samples.device)
    eps = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed)).to(samples)
    x = suspect.diffuse(samples, t, eps)
    error = (suspect.noise(x, t) - eps).square().mean().item()
    around, noise = x - x.mean(0), eps - eps.mean(0)
    scale = (around * noise).mean() / around.square().mean()
    trivial = (noise - scale * around).square().mean().item()
    if not error < worst * trivial:
        raise ModelRejectedError(
            "the network does not denoise its own samples: its error is "
            f"{error / max(trivial, 1e-12):.3g} times that of a multiple of its input",
            expected=f"below {worst:g} times",
            action="do not use this model; train it longer or export it again",
        )
    return len(samples)
