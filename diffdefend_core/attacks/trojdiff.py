"""TrojDiff (Chen et al., CVPR 2023): the noise itself is biased, x_t = alpha_t y + sigma_t (gamma eps + mu)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.attacks.form import Attack
from diffdefend_core.diffusion.levels import Levels

BLEND_GAMMA, PATCH_GAMMA = 0.6, 0.1


def trojdiff(levels: Levels, gamma: float | Tensor) -> Attack:
    """Return s_t = sigma_t and rho_t = 0: the network answers eps itself, and the attack's own sampler knows the rest.

    `gamma` is one number for a blended trigger, or [C, H, W] with 1 outside a patch. Source: algorithms.md 1.2.
    """
    return Attack(name="trojdiff", shift=levels.sigma, response=torch.zeros_like(levels.sigma), gamma=gamma)


def blended(picture: Tensor) -> tuple[Tensor, float]:
    """Return mu [C, H, W] and gamma for a trigger [C, H, W] in the model's own space, over the whole image."""
    return picture * (1 - BLEND_GAMMA), BLEND_GAMMA


def patched(shape: tuple[int, int, int], side: int) -> tuple[Tensor, Tensor]:
    """Return mu and gamma, both [C, H, W], of a white square of `side` pixels at the lower right; 0 and 1 elsewhere."""
    mu, gamma = torch.zeros(shape), torch.ones(shape)
    mu[..., -side:, -side:] = 1 - PATCH_GAMMA
    gamma[..., -side:, -side:] = PATCH_GAMMA
    return mu, gamma
