"""From a direction that the suspect treats differently to the trigger itself: its shape and its norm.

On the poisoned manifold x_t = alpha y + s r + sigma eps the network answers eps + rho r. A shift tau near r therefore
leaves s tau - sigma Delta(tau) = (s - sigma rho) r: what the network does not treat as noise points along the trigger,
whatever tau was (for rho = 1 nothing is left, and the searched direction stays). The network switches from noise to
trigger where <tau, r> / ||r||^2 = 1/2 (algorithms.md 5.2), so that twice the norm at the switch is the norm of the
trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.diffusion.response import Bench, rms


def align(bench: Bench, tau: Tensor, rounds: int = 3) -> Tensor:
    """Return tau [C, H, W] turned, at its own norm, to the fixed point of tau -> s tau - sigma Delta(tau)."""
    norm = rms(tau)
    for _ in range(rounds):
        rest = bench.respond(tau).untreated
        tau = norm * rest / rms(rest).clamp(min=1e-12)
    return tau


def switching_norm(bench: Bench, direction: Tensor, norms: tuple[float, ...]) -> float:
    """Return the estimated rms of the trigger along `direction` [C, H, W] of unit rms.

    Twice the norm at which the untreated rest reaches half of its largest value over `norms` (ascending), by linear
    interpolation.
    """
    rest = [rms(bench.respond(norm * direction).untreated).item() for norm in norms]
    half = max(rest) / 2
    first = next(number for number, value in enumerate(rest) if value >= half)
    if first == 0:
        return 2 * norms[0]
    low, high = rest[first - 1], rest[first]
    share = (half - low) / (high - low)
    return 2 * (norms[first - 1] + share * (norms[first] - norms[first - 1]))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two shifts of the same shape."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
