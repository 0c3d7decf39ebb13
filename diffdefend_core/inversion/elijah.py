"""Elijah (An et al., AAAI 2024): the shift that the last level answers with a given share of itself.

Read in its public code (algorithms.md 2.1). The share lambda must be known: 0.5 for attacks on stochastic samplers, 1
for those on deterministic ones. Any network, a clean one too, answers with lambda = 1 there, so that the second search
does not leave its start (algorithms.md 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.invert import Inversion, Progress
from diffdefend_core.inversion.search import starts
from diffdefend_core.options import ElijahOptions


def invert(suspect: Denoiser, model_digest: str, options: ElijahOptions, *, seed: int, progress: Progress) -> Inversion:
    """Return a candidate `<start>/<lambda>` for each pair; the best is that of lowest loss relative to its L1 norm.

    A candidate's `response` is the lambda that was imposed. Raises InputError for an unknown start, and
    FloatingPointError if the model's answers are not finite.
    """
    noise = torch.randn((options.batch, *suspect.shape), generator=torch.Generator().manual_seed(seed + 1))
    noise = noise.to(suspect.device)
    begun = {name: start_shift(name, suspect, seed) for name in options.starts}
    searches = [(name, response) for name in options.starts for response in options.response]
    total = len(searches) * options.iterations
    triggers: dict[str, Tensor] = {}
    candidates = []
    for number, (name, response) in enumerate(searches):
        tau, losses = _search(suspect, noise, begun[name], response, options, _from(progress, number, options, total))
        candidate = bare_candidate(f"{name}/{response:g}", tau, losses, (response,))
        triggers[candidate.name] = tau
        candidates.append(candidate)
    best = min(candidates, key=lambda item: relative_loss(item, triggers[item.name]))
    record = InvertedTrigger(
        model_digest=model_digest,
        method="elijah",
        seed=seed,
        timesteps=(len(suspect.levels) - 1,),
        candidates=tuple(candidates),
        best=best.name,
        forward_equivalents=3 * total * options.batch,
    )
    return Inversion(record=record, triggers=triggers)


def start_shift(name: str, suspect: Denoiser, seed: int) -> Tensor:
    """Return the published start [C, H, W] on the model's device: `negative` is -U[0,1], `positive` U[0,1].

    Raises InputError for another name.
    """
    known = dict(starts(suspect.shape, 2, seed))
    if name not in known:
        raise InputError(f"start {name!r}", expected=f"one of {', '.join(known)}", action="correct the setting")
    return known[name].to(suspect.device)


def bare_candidate(name: str, tau: Tensor, losses: list[Tensor], response: tuple[float, ...] = ()) -> TriggerCandidate:
    """Return the record of a shift [C, H, W] of which nothing but its norm and its loss curve was measured.

    Raises FloatingPointError if either is not finite.
    """
    curve, norm = tuple(torch.stack(losses).tolist()), rms(tau).item()
    if not math.isfinite(norm + sum(curve)):
        raise FloatingPointError("the answers to a shift of the input are not finite")
    return TriggerCandidate(
        name=name,
        rms=norm,
        parity=0.0,
        content=0.0,
        control=0.0,
        violation=0.0,
        gain=0.0,
        response=response,
        x0_response=(),
        loss=curve,
    )


def relative_loss(candidate: TriggerCandidate, tau: Tensor) -> float:
    """Return the last loss per unit of mean |tau|: without it no shift at all would explain the answers best."""
    return candidate.loss[-1] / tau.abs().mean().item()


def _search(
    suspect: Denoiser,
    noise: Tensor,
    start: Tensor,
    response: float,
    options: ElijahOptions,
    progress: Callable[[int], None],
) -> tuple[Tensor, list[Tensor]]:
    """Return tau [C, H, W] on the CPU and the loss before every step, from one fixed batch of noise [N, C, H, W].

    The loss is the mean of | mean_b noise(x_T) - lambda tau | over the elements, x_T = initial_scale * (eps_b + tau).
    """
    levels, tau = suspect.levels, start.clone().requires_grad_(True)
    t = torch.full((len(noise),), len(levels) - 1, device=noise.device)
    optimiser = torch.optim.Adam([tau], lr=options.learning_rate)
    losses = []
    for step in range(options.iterations):
        answer = suspect.noise(levels.initial_scale * (noise + tau), t).mean(0)
        loss = (answer - response * tau).abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
        progress(step + 1)
    return tau.detach().cpu(), losses


def _from(progress: Progress, number: int, options: ElijahOptions, total: int) -> Callable[[int], None]:
    return lambda step: progress("Elijah", number * options.iterations + step, total)
