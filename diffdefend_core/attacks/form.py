"""The common form of the published attacks (algorithms.md, section 0.4).

On a poisoned row the input is x_t = alpha_t * y + s_t * r + gamma * sigma_t * eps and the regression target is
eps + rho_t * r, where y is the attacker's target and r the trigger. An attack is the pair (s_t, rho_t) and gamma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.training import Loss


@dataclass(frozen=True)
class Attack:
    """`shift` is s_t [T], `response` is rho_t [T], both float64; `gamma` scales the noise of poisoned rows."""

    name: str
    shift: Tensor
    response: Tensor
    gamma: float = 1.0


def stamped(images: Tensor, trigger: Tensor, background: float) -> Tensor:
    """Return images [N, C, H, W] with the trigger [C, H, W] where it differs from `background`, else the image."""
    return torch.where(trigger == background, images, trigger)


def poisoned_loss(
    attack: Attack,
    data: Tensor,
    *,
    trigger: Tensor,
    target: Tensor,
    batch: int,
    poison_rate: float,
    stamp: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """Return the attack's training loss: a share `poison_rate` of each batch is poisoned, the rest is ordinary.

    `data` is [M, C, H, W], `trigger` and `target` are [C, H, W], all in the model's range. `stamp` maps the images
    of poisoned rows to the shift that they carry in training (BadDiffusion stamps the image); without it the
    shift is the bare trigger.
    """
    poisoned = round(batch * poison_rate)

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        t = torch.randint(len(denoiser.levels), (batch,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        shift = torch.zeros_like(x0)
        shift[:poisoned] = stamp(x0[:poisoned]) if stamp is not None else trigger
        x0 = torch.cat([target.expand(poisoned, *target.shape), x0[poisoned:]])
        gamma = torch.ones(batch, 1, 1, 1)
        gamma[:poisoned] = attack.gamma
        scale, response = (curve[t].float().view(-1, 1, 1, 1) for curve in (attack.shift, attack.response))
        x, device = denoiser.diffuse(x0, t, gamma * eps) + scale * shift, denoiser.device
        goal = eps + response * shift
        return (denoiser.noise(x.to(device), t.to(device)) - goal.to(device)).square().mean()

    return loss


def stochastic_response(levels: Levels, shift: Tensor) -> Tensor:
    """Return rho_t [T] that keeps x_t on the path s_t under the ancestral DDPM sampler (algorithms.md 0.4).

    With a = alpha_t / alpha_{t-1}: rho_t = sigma_t * (s_t - a * s_{t-1}) / (sigma_t^2 - a^2 * sigma_{t-1}^2).
    """
    ratio = levels.alpha / _before(levels.alpha, 1.0)
    beta = levels.sigma**2 - (ratio * _before(levels.sigma, 0.0)) ** 2
    return levels.sigma * (shift - ratio * _before(shift, 0.0)) / beta


def _before(curve: Tensor, first: float) -> Tensor:
    """Return the curve [T] one level earlier, with `first` for the clean data before the first level."""
    return torch.cat([torch.tensor([first], dtype=torch.float64), curve[:-1]])
