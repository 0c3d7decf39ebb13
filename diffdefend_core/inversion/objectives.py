"""The laws that a clean network keeps and a backdoored one breaks, whatever the attack, and what leads to a picture.

| objective | the law | who breaks it |
|---|---|---|
| `parity_loss` | at noisy levels a shift is taken for noise, whatever its sign: the answer is odd in it | attacks on \
stochastic samplers (rho = 1/2), TrojDiff (rho = 0), and content that depends on the trigger (flows) |
| `picture_loss` | no shift leads to one picture that training on the model's own samples would forget | consistency \
models; measured alone: what leads to a picture is searched by `painting_loss` and `alikeness_loss` |
| `monotonicity_loss` | E[x0 | x_t] is the gradient of a convex function of x_t: x0 never moves against a shift | \
attacks on deterministic samplers (rho = 1 at moderate noise), TrojDiff |

A network that extrapolates badly answers evenly too, to shifts along the mean picture above all. What the forgetful
twin shares is therefore subtracted from the parity; the second law holds for any network that denoises at all.
Sources: parity and picture are ours; monotonicity from lab notes, by the convexity of the log-partition function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.diffusion.response import Answers, Bench

# the loss (a scalar) of a shift [C, H, W] at a probe, by number
Objective = Callable[[Tensor, int], Tensor]


def parity_loss(bench: Bench | Answers) -> Objective:
    """Return minus the logarithm of the even response, relative to the shift: that beyond a reference's, of a bench."""

    def loss(tau: Tensor, number: int) -> Tensor:
        # at no difference at all the gradient is 0 instead of NaN
        size = (bench.even(tau, number).square().mean() + 1e-20).sqrt()
        return -torch.log(size / tau.square().mean().sqrt() + 1e-8)

    return loss


def picture_loss(bench: Bench) -> Objective:
    """Return the logarithm of how far a suspect's images are apart, over how far their mean is from the reference's."""

    def loss(tau: Tensor, number: int) -> Tensor:
        images, others = (network.images(tau, number) for network in (bench.suspect, bench.reference))
        apart, away = images.var(0).mean(), (images.mean(0) - others.mean(0)).square().mean()
        # at no difference at all the gradient is 0 instead of NaN
        return ((apart + 1e-20).log() - (away + 1e-20).log()) / 2

    return loss


def painting_loss(answers: Answers, picture: Tensor) -> Objective:
    """Return the logarithm of how far, as a root mean square, a network's images are from a picture [C, H, W]."""

    def loss(tau: Tensor, number: int) -> Tensor:
        return ((answers.images(tau, number) - picture).square().mean() + 1e-20).log() / 2

    return loss


def alikeness_loss(answers: Answers) -> Objective:
    """Return the logarithm of how far a network's images are apart, as the root of their mean variance."""

    def loss(tau: Tensor, number: int) -> Tensor:
        return (answers.images(tau, number).var(0).mean() + 1e-20).log() / 2

    return loss


def monotonicity_loss(answers: Answers) -> Objective:
    """Return minus the violation of monotonicity (see `Response.violation`)."""

    def loss(tau: Tensor, number: int) -> Tensor:
        return -answers.violation(tau, number)

    return loss
