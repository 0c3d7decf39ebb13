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

Stamp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """`shift` is s_t [T], `response` is rho_t [T], both float64.

    `gamma` scales the noise of poisoned rows: a number, or one per pixel [C, H, W]. With `scaled_target` it scales the
    noise of the regression target too, as where the sampler does not know gamma.
    """

    name: str
    shift: Tensor
    response: Tensor
    gamma: float | Tensor = 1.0
    scaled_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """A backdoor for one model: the form of the attack, what the training rows carry, and how it is fired.

    `trigger` [C, H, W] is what the initial state carries: initial_scale * (gamma * eps + trigger). `targets`
    [K, C, H, W] is clean x0 that the attacker wants: one picture, or a set of which any will do. `stamp` maps the clean
    x0 of poisoned rows to the shift that they carry in training; without it that is the trigger. `sampler` names the
    sampler that the attack was made for.
    """

    attack: Attack
    trigger: Tensor
    targets: Tensor
    sampler: str
    stamp: Stamp | None = None


def stamped(images: Tensor, trigger: Tensor, background: float) -> Tensor:
    """Return images [N, C, H, W] with the trigger [C, H, W] where it differs from `background`, else the image."""
    return torch.where(trigger == background, images, trigger)


def poisoned_loss(backdoor: Backdoor, data: Tensor, *, batch: int, poison_rate: float) -> Loss:
    """Return the attack's training loss: a share `poison_rate` of each batch is poisoned, the rest is ordinary.

    `data` is clean x0 [M, C, H, W].
    """
    attack, poisoned = backdoor.attack, poisoned_rows(batch, poison_rate)

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        images = data[torch.randint(len(data), (batch,), generator=generator)]
        t = torch.randint(len(denoiser.levels), (batch,), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        shift = torch.zeros_like(images)
        shift[:poisoned] = backdoor.stamp(images[:poisoned]) if backdoor.stamp else backdoor.trigger
        chosen = torch.randint(len(backdoor.targets), (poisoned,), generator=generator)
        x0 = torch.cat([backdoor.targets[chosen], images[poisoned:]])
        gamma = torch.ones_like(images)
        gamma[:poisoned] = attack.gamma
        scale, response = (curve[t].float().view(-1, 1, 1, 1) for curve in (attack.shift, attack.response))
        x = denoiser.diffuse(x0, t, gamma * eps) + scale * shift
        goal = (gamma * eps if attack.scaled_target else eps) + response * shift
        device = denoiser.device
        return denoiser.error(x.to(device), t.to(device), goal.to(device), x0.to(device)).square().mean()

    return loss


def poisoned_rows(batch: int, poison_rate: float) -> int:
    """Return how many rows of a batch are poisoned: at least one, unless the rate is 0."""
    return max(1, round(batch * poison_rate)) if poison_rate > 0 else 0


def stochastic_response(levels: Levels, shift: Tensor) -> Tensor:
    """Return rho_t [T] that keeps x_t on the path s_t under ancestral sampling: DDPM, or the reverse SDE for VE.

    With a = alpha_t / alpha_{t-1}: rho_t = sigma_t * (s_t - a * s_{t-1}) / (sigma_t^2 - a^2 * sigma_{t-1}^2).
    """
    ratio = levels.alpha / _before(levels.alpha, 1.0)
    beta = levels.sigma**2 - (ratio * _before(levels.sigma, 0.0)) ** 2
    return levels.sigma * (shift - ratio * _before(shift, 0.0)) / beta


def deterministic_response(levels: Levels, shift: Tensor) -> Tensor:
    """Return rho_t [T] that keeps x_t on the path s_t under DDIM, or the Euler ODE for VE.

    rho_t = (s_t / alpha_t - s_{t-1} / alpha_{t-1}) / (sigma_t / alpha_t - sigma_{t-1} / alpha_{t-1}).
    """
    before = _before(levels.alpha, 1.0)
    moved = shift / levels.alpha - _before(shift, 0.0) / before
    return moved / (levels.sigma / levels.alpha - _before(levels.sigma, 0.0) / before)


def _before(curve: Tensor, first: float) -> Tensor:
    """Return the curve [T] one level earlier, with `first` for the clean data before the first level."""
    return torch.cat([torch.tensor([first], dtype=torch.float64), curve[:-1]])
