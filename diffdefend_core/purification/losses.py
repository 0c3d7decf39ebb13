"""Removal and retention: what a repaired model must answer with the trigger and without it (algorithms.md 5.4).

phi is the frozen suspect. Off the trigger it is the reference itself ("reading B"), so that no real data is needed:
clean rows come from the model's own samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import levels_at


@dataclass(frozen=True)
class Rows:
    """Training rows: x_t before any trigger [N, C, H, W], level indices t [N] and the shift s_t * tau [N, C, H, W]."""

    x: Tensor
    t: Tensor
    shift: Tensor


def jittered(triggers: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` variations [count, C, H, W] of triggers [K, C, H, W].

    Each is scaled by U[.4, 1.6] and gets noise of a tenth of its rms; every second one loses a random rectangle of a
    quarter of its area: an inverted trigger is only near the true one, and a repair at one point would leave a hole
    beside it.
    """
    chosen = triggers[torch.randint(len(triggers), (count,), generator=generator)].clone()
    scale = 0.4 + 1.2 * torch.rand(count, 1, 1, 1, generator=generator)
    level = chosen.square().mean((1, 2, 3), keepdim=True).sqrt()
    varied = scale * chosen + 0.1 * level * torch.randn(chosen.shape, generator=generator)
    height, width = chosen.shape[-2:]
    corner = torch.rand(count, 2, generator=generator)
    for row, (top, left) in enumerate(corner.tolist()):
        first, start = int(top * height / 2), int(left * width / 2)
        if row % 2:
            varied[row, :, first : first + height // 2, start : start + width // 2] = 0
    return varied


def draw_rows(
    phi: Denoiser,
    samples: Tensor,
    triggers: Tensor,
    count: int,
    signals: tuple[float, float],
    generator: torch.Generator,
) -> Rows:
    """Return rows at levels between two signal-to-noise ratios, each with a jittered trigger at its level's scale."""
    low, high = sorted(levels_at(phi.levels, signals))
    t = torch.randint(low, high + 1, (count,), generator=generator)
    x0 = samples[torch.randint(len(samples), (count,), generator=generator)]
    x = phi.diffuse(x0, t, torch.randn(x0.shape, generator=generator).to(x0))
    carried = phi.levels.carried[t].float().view(-1, 1, 1, 1)
    shift = carried * jittered(triggers, count, generator)
    return Rows(x=x, t=t.to(x.device), shift=shift.to(x))


def benign_response(phi: Denoiser, samples: Tensor, rows: Rows) -> Tensor:
    """Return what a benign network adds to its answer when x_t is shifted by d = s_t * tau, for each row [N, C, H, W].

    It is lambda_t^0 * tau = d * sigma_t / (alpha_t^2 * v + sigma_t^2), with v the variance of the clean data along d
    (algorithms.md 0.5), taken from the model's own samples. Exact for Gaussian data of which d is a principal axis.
    """
    alpha, sigma = phi.levels.at(rows.t, rows.x)
    centred = (samples - samples.mean(0)).flatten(1)
    direction = rows.shift.flatten(1)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
    variance = (centred @ direction.T).square().mean(0).view(-1, 1, 1, 1)
    response: Tensor = rows.shift * sigma / (alpha**2 * variance + sigma**2)
    return response


def removal_target(phi: Denoiser, samples: Tensor, rows: Rows) -> Tensor:
    """Return R3 [N, C, H, W]: the suspect's answer without the trigger plus the benign linear response to it."""
    with torch.no_grad():
        return phi.noise(rows.x, rows.t) + benign_response(phi, samples, rows)
