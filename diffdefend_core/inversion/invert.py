"""The whole inversion of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.response import Answers, Bench, levels_at, probes_at, rms
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.inversion.objectives import monotonicity_loss, parity_loss
from diffdefend_core.inversion.refine import align, switching_norm
from diffdefend_core.inversion.search import Track, normal_starts, race, race_length
from diffdefend_core.inversion.twin import forgetful_twin
from diffdefend_core.options import InversionOptions

Progress = Callable[[str, int, int], None]

# A signal alpha / sigma below MODERATE names a noisy level, where stochastic attacks show; above it deterministic ones
# do.
MODERATE = 0.1
# below CERTAIN networks that are not ideal violate monotonicity, backdoored or not
CERTAIN = 0.2
# what clean networks reach at most, roughly; the verdict does not depend on these
ORDINARY_PARITY, ORDINARY_VIOLATION = 0.04, 0.1
ONE_PICTURE = 1e-6  # own samples closer than this, in the units of x0, differ by rounding


@dataclass(frozen=True)
class Inversion:
    """The record, the shifts by candidate name [C, H, W] at their estimated norm, and what the method needed for them.

    `reference` is the forgetful twin; other methods have none.
    """

    record: InvertedTrigger
    triggers: dict[str, Tensor]
    reference: Denoiser | None = None


def invert(
    suspect: Denoiser,
    model_digest: str,
    options: InversionOptions,
    *,
    seed: int,
    progress: Progress,
    reference: Denoiser | None = None,
) -> Inversion:
    """Search the trigger of a frozen `suspect`; a trusted `reference` takes the place of the forgetful twin.

    Raises FloatingPointError if the model's answers are not finite, or its own samples are all one picture, and
    ModelRejectedError if it does not denoise these.
    """
    samples = own_samples(suspect, options.own_samples, options.own_steps, seed, progress)
    if rms(samples - samples.mean(0)).item() < ONE_PICTURE:
        raise FloatingPointError("the model's own samples are all one picture")
    checked = check_denoising(suspect, samples, options.worst_error, seed)
    twin = reference or forgetful_twin(
        suspect,
        samples,
        steps=options.twin_steps,
        batch=options.twin_batch,
        learning_rate=options.twin_learning_rate,
        generator=torch.Generator().manual_seed(seed),
        progress=lambda done, total: progress("forgetful twin", done, total),
    )
    noisy, moderate = levels_at(suspect.levels, options.signals), levels_at(suspect.levels, options.moderate_signals)
    bench = Bench(suspect, twin, samples, noisy, pairs=options.pairs, seed=seed, each=options.probes)
    alone = Answers(suspect, probes_at(samples, moderate, pairs=options.pairs, seed=seed + 1, each=options.probes))
    objectives = {
        "parity": (parity_loss(bench), len(bench.probes), options.rms, options.learning_rate),
        "monotonicity": (
            monotonicity_loss(alone),
            len(alone.probes),
            options.moderate_rms,
            options.moderate_learning_rate,
        ),
    }
    levels = levels_at(suspect.levels, options.probe_signals)
    measuring = Bench(suspect, twin, samples, levels, pairs=options.probe_pairs, seed=seed + 2)
    checking = Bench(suspect, twin, samples, noisy, pairs=options.probe_pairs, seed=seed + 3)
    turning = {
        "parity": checking.suspect,
        "monotonicity": Answers(suspect, probes_at(samples, moderate, pairs=options.probe_pairs, seed=seed + 3)),
    }
    found = []
    for number, (name, (objective, probes, norm, rate)) in enumerate(objectives.items()):
        track = race(
            objective, probes, _starts(name, suspect, options.starts, seed), options, seed=seed + number,
            norm=norm, learning_rate=rate,
            progress=_counting(progress, number, len(objectives), options),
        )  # fmt: skip
        found.append(_finish(name, track, turning[name], checking, measuring, options))
    sampler = usual(suspect)
    drawn = options.own_samples * steps_for(suspect, sampler, options.own_steps) * sampler.calls
    trained = 0 if reference is not None else options.twin_steps * options.twin_batch * 3
    record = InvertedTrigger(
        model_digest=model_digest,
        method="diffdefend",
        seed=seed,
        timesteps=levels,
        candidates=tuple(candidate for candidate, _ in found),
        best=max((candidate for candidate, _ in found), key=_strength).name,
        forward_equivalents=drawn
        + checked
        + trained
        + sum(part.spent for part in (bench, alone, checking, measuring, turning["monotonicity"])),
    )
    return Inversion(record=record, triggers={item.name: tau for item, tau in found}, reference=twin)


@torch.no_grad()
def check_denoising(suspect: Denoiser, samples: Tensor, worst: float, seed: int) -> int:
    """Raise ModelRejectedError if the network is no denoiser of its own `samples` [N, C, H, W]; return what it cost.

    Where signal and noise are alike (alpha = sigma), its error must be below `worst` times the smallest error that a
    multiple of the input can have. A network that has learnt nothing of its pictures keeps both laws: there is nothing
    in it that a search could judge.
    """
    level = levels_at(suspect.levels, (1.0,))[0]
    t = torch.full((len(samples),), level, device=samples.device)
    eps = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed)).to(samples)
    x = suspect.diffuse(samples, t, eps)
    error = (suspect.noise(x, t) - eps).square().mean().item()
    around, noise = x - x.mean(0), eps - eps.mean(0)
    scale = (around * noise).mean() / around.square().mean()
    trivial = (noise - scale * around).square().mean().item()
    if not error < worst * trivial:
        raise ModelRejectedError(
            "the network does not denoise its own samples: its error is "
            f"{error / max(trivial, 1e-12):.3g} times that of a multiple of its input",
            expected=f"below {worst:g} times",
            action="do not use this model; train it longer or export it again",
        )
    return len(samples)


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
    name: str, track: Track, turning: Answers, checking: Bench, measuring: Bench, options: InversionOptions
) -> tuple[TriggerCandidate, Tensor]:
    """Return what was found with its norm, measured on fresh noise.

    Parity does not tell tau from -tau: the trigger is the one that the network takes less for noise. What was searched
    shows the backdoor best, because the twin has forgotten most there; it is then turned to the trigger's own shape.
    """
    tau = track.shift.detach()
    parity, control = measuring.parity(tau), 0.0
    if name == "parity":
        control = max(sum(checking.parity(item).difference) / len(checking.probes) for item in controls(tau))
        tau = align(turning, max((tau, -tau), key=lambda item: sum(measuring.respond(item).gain)))
    response = measuring.respond(tau)
    norm = switching_norm(turning, tau / rms(tau), options.norms)
    noisy = [signal < MODERATE for signal in options.probe_signals]
    moderate = [not item for item in noisy]
    candidate = TriggerCandidate(
        name=name,
        rms=norm,
        parity=_mean(parity.difference, noisy),
        content=_mean(parity.content, moderate),
        control=control,
        violation=max(
            value for value, signal in zip(response.violation, options.probe_signals, strict=True) if signal > CERTAIN
        ),
        gain=_mean(response.gain, noisy),
        response=response.slope,
        x0_response=response.x0_slope,
        loss=tuple(value.item() for value in track.loss),
    )
    return candidate, (norm * tau / rms(tau)).cpu()


def _starts(name: str, suspect: Denoiser, count: int, seed: int) -> list[Tensor]:
    """Return the starts of a search: parity has no sign and begins with U[0,1], which most triggers are near."""
    begun = normal_starts(suspect.shape, count, seed)
    if name == "parity":
        begun[0] = torch.rand(suspect.shape, generator=torch.Generator().manual_seed(seed))
    return [start.to(suspect.device) for start in begun]


def controls(tau: Tensor) -> list[Tensor]:
    """Return shifts of the norm of tau [C, H, W] that are no trigger: a constant, and tau with its pixels shuffled.

    A network that extrapolates badly answers evenly to a constant shift, and to any that has a mean.
    """
    order = torch.randperm(tau.numel(), generator=torch.Generator().manual_seed(0)).to(tau.device)
    return [torch.full_like(tau, rms(tau).item()), tau.flatten()[order].view_as(tau)]


def _strength(candidate: TriggerCandidate) -> float:
    """Return how strongly a candidate breaks either law, on a common scale: for the choice of what is shown first."""
    return max(candidate.parity / ORDINARY_PARITY, candidate.violation / ORDINARY_VIOLATION)


def _counting(progress: Progress, number: int, races: int, options: InversionOptions) -> Callable[[int, int], None]:
    length = race_length(options)
    return lambda done, total: progress("search", number * length + done, races * length)


def _mean(values: tuple[float, ...], chosen: list[bool]) -> float:
    kept = [value for value, keep in zip(values, chosen, strict=True) if keep]
    return sum(kept) / len(kept)
