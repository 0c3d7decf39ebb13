"""InviBackdoor: an invisible trigger, learned against the model and planted in turn (algorithms.md 1.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdefend_core.attacks.form import Attack, deterministic_response
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.samplers import trailing_steps

BOUND = 0.2
# Below so many pixels the published bound leaves a trigger that noise drowns: it has the L2 norm of this many instead.
LEAST_PIXELS = 1024


def bound_for(shape: tuple[int, int, int]) -> float:
    """Return the largest value of a trigger of `shape`: 0.2, more for small images (their L2 norm is at most 6.4)."""
    return BOUND * max(1.0, math.sqrt(LEAST_PIXELS / math.prod(shape)))


def invibackdoor(levels: Levels) -> Attack:
    """Return s_t = 1 - sqrt(A_t) with the response that is exact for DDIM."""
    shift: Tensor = 1 - levels.alpha
    return Attack(name="invibackdoor", shift=shift, response=deterministic_response(levels, shift))


def improve_trigger(
    denoiser: Denoiser,
    trigger: Tensor,
    target: Tensor,
    optimiser: torch.optim.Optimizer,
    *,
    batch: int,
    generator: torch.Generator,
    steps: int = 10,
) -> float:
    """Take one inner step on `trigger` [C, H, W] in place and return its loss, the mean squared error to `target`.

    The images are those of `steps` DDIM steps from eps + trigger, with the gradient through the sampler; its sign goes
    to the optimiser, and the trigger stays within +-0.2 (more for small images, see `bound_for`).
    """
    target = target.to(denoiser.device)
    noise = torch.randn(batch, *denoiser.shape, generator=generator)
    x = (noise + trigger).to(denoiser.device)
    times = trailing_steps(len(denoiser.levels), min(steps, len(denoiser.levels)))
    for t, following in zip(times, [*times[1:], None], strict=True):
        index = torch.full((batch,), t, device=x.device)
        noise = denoiser.noise(x, index)
        alpha, sigma = denoiser.levels.alpha[t].item(), denoiser.levels.sigma[t].item()
        x = (x - sigma * noise) / alpha
        if following is not None:
            x = denoiser.levels.alpha[following].item() * x + denoiser.levels.sigma[following].item() * noise
    loss = (x - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, trigger)
    trigger.grad = gradient.sign()
    optimiser.step()
    with torch.no_grad():
        trigger.clamp_(-bound_for(denoiser.shape), bound_for(denoiser.shape))
    return loss.item()
