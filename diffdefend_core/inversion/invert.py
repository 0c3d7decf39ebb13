"""The whole inversion of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.response import Bench, levels_at, rms
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.inversion.refine import align, switching_norm
from diffdefend_core.inversion.search import Track, race
from diffdefend_core.inversion.twin import forgetful_twin
from diffdefend_core.options import InversionOptions

Progress = Callable[[str, int, int], None]

# A signal alpha / sigma below MODERATE names a noisy level, where stochastic attacks show; above it deterministic ones
# do. Below FAINT the predicted x0 is too uncertain to say in which direction it moves.
MODERATE, FAINT = 0.1, 0.03


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
    pairs, noisy = options.probe_pairs, levels_at(suspect.levels, options.signals)
    search = Bench(suspect, twin, samples, noisy, pairs=options.pairs, seed=seed, each=options.probes)
    tracks = race(
        search, suspect.shape, options, seed=seed, progress=lambda done, total: progress("search", done, total)
    )
    levels = levels_at(suspect.levels, options.probe_signals)
    turning = Bench(suspect, twin, samples, noisy, pairs=pairs, seed=seed + 1)
    measuring = Bench(suspect, twin, samples, levels, pairs=pairs, seed=seed + 2)
    triggers: dict[str, Tensor] = {}
    candidates = []
    for track in tracks:
        candidate, tau = _finish(track, turning, measuring, options)
        triggers[candidate.name] = tau
        candidates.append(candidate)
    best = max(candidates, key=lambda item: item.difference + item.moderate_difference)
    sampler = usual(suspect)
    drawn = options.own_samples * steps_for(suspect, sampler, options.own_steps) * sampler.calls
    trained = options.twin_steps * options.twin_batch * 3
    record = InvertedTrigger(
        model_digest=model_digest,
        method=options.method,
        seed=seed,
        timesteps=levels,
        candidates=tuple(candidates),
        best=best.name,
        forward_equivalents=drawn + trained + sum(bench.spent for bench in (search, turning, measuring)),
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
    track: Track, turning: Bench, measuring: Bench, options: InversionOptions
) -> tuple[TriggerCandidate, Tensor]:
    """Return the better of the searched direction and its aligned form, measured on fresh noise, with its norm."""
    searched = (options.rms * track.direction / rms(track.direction)).detach()
    aligned = align(turning, searched)
    measured = [
        (measuring.respond(tau), tau, name)
        for tau, name in ((searched, track.name), (aligned, f"{track.name}/aligned"))
    ]
    response, tau, name = max(measured, key=lambda item: sum(item[0].difference))
    norm = switching_norm(turning, tau / rms(tau), options.norms)
    if name.endswith("aligned"):
        tau = align(turning, norm * tau / rms(tau), rounds=2)
    noisy = [signal < MODERATE for signal in options.probe_signals]
    candidate = TriggerCandidate(
        name=name,
        rms=norm,
        difference=_mean(response.difference, noisy),
        moderate_difference=_mean(response.difference, [not item for item in noisy]),
        gain=_mean(response.gain, noisy),
        response=response.slope,
        x0_response=response.x0_slope,
        violation=max(
            value for value, signal in zip(response.violation, options.probe_signals, strict=True) if signal > FAINT
        ),
        loss=tuple(track.loss),
    )
    return candidate, (norm * tau / rms(tau)).cpu()


def _mean(values: tuple[float, ...], chosen: list[bool]) -> float:
    kept = [value for value, keep in zip(values, chosen, strict=True) if keep]
    return sum(kept) / len(kept)
