"""From a direction that the suspect treats differently to the trigger itself: its shape and its norm.

On the poisoned manifold x_t = alpha y + s r + sigma eps the network answers eps + rho r. A shift tau near r therefore
leaves s tau - sigma Delta(tau) = (s - sigma rho) r: what the network does not treat as noise points along the trigger,
whatever tau was (for rho = 1 nothing is left). The network switches from noise to trigger where <tau, r> / ||r||^2 =
1/2 (algorithms.md 5.2), so that twice the norm at the switch is the norm of the trigger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdefend_core.diffusion.response import Answers, rms

# Processes whose networks answer clean data at every level. They take every shift for noise (rho = 1), so that what is
# left of one is the picture that it paints, and no trigger.
ALL_NOISE = ("flow", "consistency")


@torch.no_grad()
def align(answers: Answers, tau: Tensor, rounds: int = 3) -> Tensor:
    """Return tau [C, H, W] turned, at its own norm, to the fixed point of tau -> s tau - sigma Delta(tau).

    It stays what it is for processes of ALL_NOISE.
    """
    if answers.denoiser.process in ALL_NOISE:
        return tau
    norm = rms(tau)
    for _ in range(rounds):
        rest = torch.stack([answers.untreated(tau, number) for number in range(len(answers.probes))]).mean(0)
        tau = norm * rest / rms(rest).clamp(min=1e-12)
    return tau


@torch.no_grad()
def untreated_share(answers: Answers, tau: Tensor) -> float:
    """Return the share of tau [C, H, W] that the network does not treat as noise, the mean over all probes."""
    return sum(rms(answers.untreated(tau, number)).item() for number in range(len(answers.probes))) / (
        len(answers.probes) * rms(tau).item()
    )


@torch.no_grad()
def noise_gain(answers: Answers, tau: Tensor) -> float:
    """Return the slope of the predicted noise on the noise under the shift tau [C, H, W], the mean over all probes.

    A trigger that scales the noise by gamma makes the network see 1 / gamma times as much of it.
    """
    slopes = []
    for number, at in enumerate(answers.probes):
        t = torch.full((len(at.x0),), at.t, device=at.x0.device)
        answer = answers.denoiser.noise(answers.denoiser.diffuse(at.x0, t, at.eps) + answers.carried(number) * tau, t)
        answers.spent += len(at.x0)
        slopes.append(((answer * at.eps).sum() / at.eps.square().sum()).item())
    return sum(slopes) / len(slopes)


@torch.no_grad()
def switching_norm(answers: Answers, direction: Tensor, norms: tuple[float, ...]) -> float:
    """Return the estimated rms of the trigger along `direction` [C, H, W] of unit rms.

    Twice the norm at which the even response reaches half of its largest value over `norms` (ascending), by linear
    interpolation. Raises FloatingPointError if an answer is not finite.
    """
    even = [_even(answers, norm * direction) for norm in norms]
    if not math.isfinite(sum(even)):
        raise FloatingPointError("the answers to a shift of the input are not finite")
    half = max(even) / 2
    first = next(number for number, value in enumerate(even) if value >= half)
    if first == 0:
        return 2 * norms[0]
    low, high = even[first - 1], even[first]
    share = (half - low) / (high - low)
    return 2 * (norms[first - 1] + share * (norms[first] - norms[first - 1]))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two shifts of the same shape."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def _even(answers: Answers, tau: Tensor) -> float:
    parts = [answers.even(tau, number) for number in range(len(answers.probes))]
    return rms(torch.stack(parts).mean(0)).item()
