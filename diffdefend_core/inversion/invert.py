"""The whole inversion of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.response import levels_at, respond, rms
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.inversion.refine import align, switching_norm
from diffdefend_core.inversion.search import Track, race
from diffdefend_core.inversion.twin import forgetful_twin
from diffdefend_core.options import InversionOptions

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Inversion:
    """The record, the shifts by candidate name [C, H, W] at their estimated norm, the twin and the own samples."""

    record: InvertedTrigger
    triggers: dict[str, Tensor]
    reference: Denoiser
    samples: Tensor


def invert(
    suspect: Denoiser, model_digest: str, options: InversionOptions, *, seed: int, progress: Progress
) -> Inversion:
    """Search the trigger of a frozen `suspect`. Raises FloatingPointError if the model's answers are not finite."""
    samples = own_samples(suspect, options.own_samples, options.own_steps, seed, progress)
    twin = forgetful_twin(
        suspect,
        samples,
        steps=options.twin_steps,
        batch=options.twin_batch,
        learning_rate=options.twin_learning_rate,
        generator=torch.Generator().manual_seed(seed),
        progress=lambda done, total: progress("forgetful twin", done, total),
    )
    tracks = race(
        suspect, twin, samples, options, seed=seed, progress=lambda done, total: progress("search", done, total)
    )
    levels = levels_at(suspect.levels, options.probe_signals)
    triggers: dict[str, Tensor] = {}
    candidates = []
    for track in tracks:
        candidate, tau = _finish(track, suspect, twin, samples, levels, options, seed)
        triggers[candidate.name] = tau
        candidates.append(candidate)
    best = max(candidates, key=lambda item: item.difference)
    record = InvertedTrigger(
        model_digest=model_digest,
        method=options.method,
        seed=seed,
        timesteps=levels,
        candidates=tuple(candidates),
        best=best.name,
        forward_equivalents=_cost(suspect, options, len(tracks)),
    )
    return Inversion(record=record, triggers=triggers, reference=twin, samples=samples)


def own_samples(denoiser: Denoiser, count: int, steps: int, seed: int, progress: Progress) -> Tensor:
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


def _finish(
    track: Track,
    suspect: Denoiser,
    twin: Denoiser,
    samples: Tensor,
    levels: tuple[int, ...],
    options: InversionOptions,
    seed: int,
) -> tuple[TriggerCandidate, Tensor]:
    """Return the better of the searched direction and its aligned form, measured on fresh noise, with its norm."""
    noisy = levels_at(suspect.levels, options.signals[::2])
    pairs = options.probe_pairs
    searched = (options.rms * track.direction / rms(track.direction)).detach()
    aligned = align(suspect, twin, searched, samples, levels=noisy, pairs=pairs, seed=seed + 1)
    measured = [
        (respond(suspect, twin, tau, samples, levels, pairs, seed + 2), tau, name)
        for tau, name in ((searched, track.name), (aligned, f"{track.name}/aligned"))
    ]
    response, tau, name = max(measured, key=lambda item: sum(item[0].difference))
    norm = switching_norm(
        suspect, twin, tau / rms(tau), samples, levels=noisy, norms=options.norms, pairs=pairs // 2, seed=seed + 3
    )
    if name.endswith("aligned"):
        tau = align(suspect, twin, norm * tau / rms(tau), samples, levels=noisy, pairs=pairs, seed=seed + 4, rounds=2)
    candidate = TriggerCandidate(
        name=name,
        rms=norm,
        difference=sum(response.difference) / len(levels),
        gain=sum(response.gain) / len(levels),
        response=response.slope,
        x0_response=response.x0_slope,
        loss=tuple(track.loss),
    )
    return candidate, (norm * tau / rms(tau)).cpu()


def _cost(suspect: Denoiser, options: InversionOptions, tracks: int) -> int:
    """Return the network evaluations of single samples: forward 1, forward and backward 3."""
    iterations = options.starts * options.race_iterations
    iterations += options.finalists * (options.iterations - options.race_iterations)
    rows, noisy = 2 * options.probe_pairs, len(options.signals[::2])
    measuring = rows * 4 * (5 * noisy + 2 * len(options.probe_signals)) + rows // 2 * 4 * noisy * len(options.norms)
    return (
        options.own_samples * steps_for(suspect, usual(suspect), options.own_steps) * usual(suspect).calls
        + options.twin_steps * options.twin_batch * 3
        + iterations * 2 * options.pairs * 2 * (3 + 1)
        + tracks * measuring
    )
