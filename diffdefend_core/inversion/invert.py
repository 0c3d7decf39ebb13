"""The whole inversion of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Answers, Bench, levels_at, probes_at, rms
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.inversion.objectives import monotonicity_loss, parity_loss
from diffdefend_core.inversion.patch import extent, is_patch
from diffdefend_core.inversion.picture import LAW, Paintings, forgotten_triggers, pictured
from diffdefend_core.inversion.refine import ALL_NOISE, align, noise_gain, switching_norm, untreated_share
from diffdefend_core.inversion.samples import check_samples, own_samples
from diffdefend_core.inversion.search import Track, normal_starts, race, race_length
from diffdefend_core.inversion.twin import forgetful_twin
from diffdefend_core.options import InversionOptions

Progress = Callable[[str, int, int], None]

# A signal alpha / sigma below MODERATE names a noisy level, where stochastic attacks show; above it deterministic ones
# do.
MODERATE = 0.1
# Of processes of ALL_NOISE only levels below this one are noisy: they answer clean data at every level, and what is
# even in the answers grows with the signal, in a clean network most.
NOISIEST = 0.02
# below CERTAIN networks that are not ideal violate monotonicity, backdoored or not
CERTAIN = 0.2
# what clean networks reach at most, roughly; the verdict does not depend on these
ORDINARY_PARITY, ORDINARY_VIOLATION = 0.04, 0.1
ORDINARY_PARITY_OF = {"flow": 0.0005, "consistency": LAW}
RACES = 2  # one for each law
# what is so many times as even as in clean networks, and lies in few pixels, is searched on there with so large a step
STANDING_OUT, PATCH_STEP = 2.0, 0.2


@dataclass(frozen=True)
class Inversion:
    """The record, the shifts by candidate name [C, H, W] at their estimated norm, and what the method needed for them.

    `reference` is the forgetful twin; other methods have none.
    """

    record: InvertedTrigger
    triggers: dict[str, Tensor]
    reference: Denoiser | None = None


class _Stand:
    """All probes of one inversion: those that are searched, and fresh ones on which the findings are measured."""

    def __init__(
        self, suspect: Denoiser, twin: Denoiser, samples: Tensor, options: InversionOptions, seed: int
    ) -> None:
        noisy = levels_at(suspect.levels, options.signals)
        noisiest = levels_at(suspect.levels, (min(options.signals),))
        moderate = levels_at(suspect.levels, options.moderate_signals)
        every = suspect.process in ALL_NOISE
        self.options, self.faint = options, NOISIEST if every else MODERATE
        self.levels = levels_at(suspect.levels, options.probe_signals)
        measured = noisiest if every else noisy
        if suspect.process == "consistency":
            measured = noisiest * len(noisy)  # as many probes
        lay, fresh = partial(Bench, suspect, twin, samples), options.probe_pairs
        self.searched = lay(noisy, pairs=options.pairs, seed=seed, each=options.probes)
        self.alone = Answers(
            suspect, probes_at(samples, moderate, pairs=options.pairs, seed=seed + 1, each=options.probes)
        )
        self.measuring = lay(self.levels, pairs=fresh, seed=seed + 2)
        self.noisy = lay(measured, pairs=fresh, seed=seed + 3)
        self.moderate = Answers(suspect, probes_at(samples, moderate, pairs=fresh, seed=seed + 3))
        self.quiet = lay(measured, pairs=options.pairs, seed=seed + 4, noise=options.quiet_noise)
        self.still = lay(measured, pairs=fresh, seed=seed + 3, noise=options.still_noise)

    @property
    def spent(self) -> int:
        """The network evaluations so far."""
        benches = (self.searched, self.measuring, self.noisy, self.quiet, self.still)
        return sum(bench.spent for bench in benches) + self.alone.spent + self.moderate.spent

    def race(
        self, begun: list[Tensor], options: InversionOptions, *, norm: float, learning_rate: float, seed: int,
        progress: Callable[[int, int], None],
    ) -> Track:  # fmt: skip
        """Return the best track of a race of the starts [C, H, W] over the searched probes."""
        bench = self.searched
        started = [start.to(bench.suspect.denoiser.device) for start in begun]
        return race(
            parity_loss(bench), len(bench.probes), started, options,
            norm=norm, learning_rate=learning_rate, seed=seed, progress=progress,
        )  # fmt: skip

    def candidate(
        self, name: str, tau: Tensor, track: Track, turning: Answers, *, parity: float, content: float, control: float
    ) -> tuple[TriggerCandidate, Tensor]:
        """Return the record of a found shift, and the shift [C, H, W] at the norm where `turning` switches."""
        response = self.measuring.respond(tau)
        norm = switching_norm(turning, tau / rms(tau), self.options.norms)
        found = TriggerCandidate(
            name=name,
            rms=norm,
            parity=parity,
            content=content,
            control=control,
            violation=max(self.where(response.violation, lambda signal: signal > CERTAIN)),
            gain=_mean(self.where(response.gain, _is_noisy)),
            response=response.slope,
            x0_response=response.x0_slope,
            loss=tuple(value.item() for value in track.loss),
        )
        return found, (norm * tau / rms(tau)).cpu()

    def evenness(self, tau: Tensor) -> tuple[float, float]:
        """Return the parity of tau [C, H, W] where it is noisy, and the content elsewhere; see `pictured`."""
        found = self.measuring.parity(tau)
        moderate = self.where(found.content, lambda signal: not _is_noisy(signal))
        if self.noisy.suspect.denoiser.process == "consistency":
            return pictured(self.noisy, tau), _mean(moderate)
        return _mean(self.where(found.difference, lambda signal: signal < self.faint)), _mean(moderate)

    def where(self, values: tuple[float, ...], wanted: Callable[[float], bool]) -> list[float]:
        """Return those of the values at the probe signals whose signal is wanted."""
        return [value for value, signal in zip(values, self.options.probe_signals, strict=True) if wanted(signal)]


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
    checked = check_samples(suspect, samples, options.worst_error, seed)
    consistency = suspect.process == "consistency"
    twin = reference or forgetful_twin(
        suspect,
        samples,
        steps=options.twin_steps,
        batch=options.twin_batch,
        learning_rate=options.consistency_twin_learning_rate if consistency else options.twin_learning_rate,
        generator=torch.Generator().manual_seed(seed),
        progress=lambda done, total: progress("forgetful twin", done, total),
    )
    stand = _Stand(suspect, twin, samples, options, seed)
    ordinary = ORDINARY_PARITY_OF.get(suspect.process, ORDINARY_PARITY)
    pictures = 0
    if consistency:
        painted = forgotten_triggers(
            stand.noisy, samples, options, seed=seed,
            progress=lambda done, total: progress("forgotten pictures", done, total),
            counting=lambda begin, end: _counting(progress, options, begin / 2, end / 2),
        )  # fmt: skip
        found, pictures = _painted(stand, painted), painted.forward_equivalents
    else:
        even = _most_even(suspect, stand, options, seed, progress)
        found = [_even(stand, even, ordinary, seed), _even_in_quiet(stand, even)]
    found.append(_against(stand, _least_monotone(suspect, stand, options, seed, progress)))
    sampler = usual(suspect)
    drawn = options.own_samples * steps_for(suspect, sampler, options.own_steps) * sampler.calls
    passes = 4 if consistency else 3  # a path has two points, one of them without a gradient
    trained = 0 if reference is not None else options.twin_steps * options.twin_batch * passes
    record = InvertedTrigger(
        model_digest=model_digest,
        method="diffdefend",
        seed=seed,
        timesteps=stand.levels,
        candidates=tuple(candidate for candidate, _ in found),
        best=_best(found, ordinary),
        forward_equivalents=drawn + checked + trained + stand.spent + pictures,
    )
    return Inversion(record=record, triggers={item.name: tau for item, tau in found}, reference=twin)


def _most_even(suspect: Denoiser, stand: _Stand, options: InversionOptions, seed: int, progress: Progress) -> Track:
    """Race for parity, which has no sign; one start is U[0,1], which most triggers are near.

    A flow answers the clean data at every level, and moves it the more evenly the larger a shift is: what it has no
    trigger for moves in proportion, so that a small one stands out.
    """
    begun = normal_starts(suspect.shape, options.starts, seed)
    begun[0] = torch.rand(suspect.shape, generator=torch.Generator().manual_seed(seed))
    norm = options.flow_rms if suspect.process == "flow" else options.rms
    return stand.race(
        begun, options, norm=norm, learning_rate=options.learning_rate, seed=seed,
        progress=_counting(progress, options, 0, 0.5),
    )  # fmt: skip


def _least_monotone(
    suspect: Denoiser, stand: _Stand, options: InversionOptions, seed: int, progress: Progress
) -> Track:
    begun = [start.to(suspect.device) for start in normal_starts(suspect.shape, options.starts, seed)]
    return race(
        monotonicity_loss(stand.alone), len(stand.alone.probes), begun, options,
        norm=options.moderate_rms, learning_rate=options.moderate_learning_rate, seed=seed + 1,
        progress=_counting(progress, options, 0.5, 1),
    )  # fmt: skip


def _painted(stand: _Stand, paintings: Paintings) -> list[tuple[TriggerCandidate, Tensor]]:
    """Return the record of each shift that leads to one picture, with its opposite as the control, and the shift."""
    found: list[tuple[TriggerCandidate, Tensor]] = []
    for number, item in enumerate((paintings.best, *paintings.others), 1):
        name, tau = f"picture-{number}" if found else "parity", item.shift
        _, content = stand.evenness(tau)
        control, answers = max(LAW, pictured(stand.noisy, -tau)), stand.noisy.suspect
        found.append(
            stand.candidate(name, tau, item.track, answers, parity=item.parity, content=content, control=control)
        )
    return found


def _even(stand: _Stand, track: Track, ordinary: float, seed: int) -> tuple[TriggerCandidate, Tensor]:
    """Measure the parity of what was searched, and turn it to the trigger's own shape.

    What was searched shows the backdoor best, because the twin has forgotten most there. `ordinary` is the parity that
    clean networks of the process reach.
    """
    tau, answers = track.shift.detach(), stand.noisy.suspect
    parity, content = stand.evenness(tau)
    control = _control(stand.noisy, tau)
    if _stands_out_in_a_patch(parity, tau, ordinary):
        turned = _signed(answers, _patch(stand, tau, seed))
    else:
        turned = align(answers, _signed(answers, tau))
    return stand.candidate("parity", turned, track, answers, parity=parity, content=content, control=control)


def _stands_out_in_a_patch(parity: float, tau: Tensor, ordinary: float) -> bool:
    return parity > STANDING_OUT * ordinary and is_patch(tau)


def _patch(stand: _Stand, tau: Tensor, seed: int) -> Tensor:
    """Return the patch [C, H, W] that a search at a fixed norm found the place of, but not what it looks like.

    All of that norm lies in few pixels. A network answers to so much there whatever its sign, and an attack that also
    quiets the noise of its patch shows the network nothing of the kind. At sqrt(extent) times the norm each pixel has
    what the pixels of a trigger over the whole image have. What is left untreated is not the patch but its target where
    the network takes it for noise, so that it is not aligned. Ours (not published).
    """
    norm = rms(tau).item() * extent(tau) ** 0.5
    return stand.race(
        [tau], stand.options, norm=norm, learning_rate=PATCH_STEP, seed=seed, progress=lambda done, total: None
    ).shift.detach()


def _even_in_quiet(stand: _Stand, track: Track) -> tuple[TriggerCandidate, Tensor]:
    """Return what stands out more where the noise is too quiet: the found shift, turned there, or no shift at all.

    TrojDiff's trigger is less noise as well as a shift, and the network switches on both: with ordinary noise the
    switch may be too narrow to be found.
    """
    found = max((_turned_in_quiet(stand, track), _offset_in_still(stand, track)), key=_Quiet.contrast)
    _, content = stand.evenness(found.tau)
    return stand.candidate(
        "quiet", found.tau, track, found.answers, parity=found.parity, content=content, control=found.control
    )


@dataclass(frozen=True)
class _Quiet:
    """A shift [C, H, W] found in noise that is too quiet, the answers that turned it, its parity and the control's."""

    tau: Tensor
    answers: Answers
    parity: float
    control: float

    def contrast(self) -> float:
        """Return the parity over that of the control, or over half of an ordinary one if that is more."""
        return self.parity / max(self.control, ORDINARY_PARITY / 2)


def _turned_in_quiet(stand: _Stand, track: Track) -> _Quiet:
    """Turn the found shift to a fixed point in quiet noise, from both sides. A clean network has none there."""
    tau, quiet = track.shift.detach(), stand.quiet
    turned = max((align(quiet.suspect, sign * tau) for sign in (1, -1)), key=lambda item: _parity(quiet, item))
    parity, control = _parity(quiet, turned), _control(quiet, turned)
    turned = _signed_in_quiet(quiet.suspect, turned)
    return _Quiet(turned, quiet.suspect, parity, control)


def _offset_in_still(stand: _Stand, track: Track) -> _Quiet:
    """Return what the suspect, but not its twin, takes away in still noise without any shift, at the searched norm.

    Noise has a mean of 0, whatever its deviation. A network that switches on little noise answers with minus its shift
    there, and with as much to any shift that turns the switch off: only ordinary noise is a control, and what both have
    in common is no answer to the stillness.
    """
    still, norm = stand.still, rms(track.shift.detach()).item()
    offset = -still.offset().mean(0)
    tau = norm * offset / rms(offset).clamp(min=1e-12)
    found, control = (_rms_each(bench.offset()) / norm for bench in (still, stand.noisy))
    return _Quiet(tau, still.suspect, max(0.0, found - control), control)


def _against(stand: _Stand, track: Track) -> tuple[TriggerCandidate, Tensor]:
    tau = track.shift.detach()
    parity, content = stand.evenness(tau)
    return stand.candidate("monotonicity", tau, track, stand.moderate, parity=parity, content=content, control=0.0)


def controls(tau: Tensor) -> list[Tensor]:
    """Return shifts of the norm of tau [C, H, W] that are no trigger: a constant, and tau with its pixels shuffled.

    A network that extrapolates badly answers evenly to a constant shift, and to any that has a mean.
    """
    order = torch.randperm(tau.numel(), generator=torch.Generator().manual_seed(0)).to(tau.device)
    return [torch.full_like(tau, rms(tau).item()), tau.flatten()[order].view_as(tau)]


def _rms_each(x: Tensor) -> float:
    """Return the rms of each of x [K, C, H, W], the mean over them."""
    return sum(rms(item).item() for item in x) / len(x)


def _parity(bench: Bench, tau: Tensor) -> float:
    return sum(bench.parity(tau).difference) / len(bench.probes)


def _control(bench: Bench, tau: Tensor) -> float:
    return max(_parity(bench, item) for item in controls(tau))


def _signed(answers: Answers, tau: Tensor) -> Tensor:
    """Return tau or -tau: parity does not tell them apart; the trigger is the one taken less for noise."""
    return max((tau, -tau), key=lambda item: untreated_share(answers, item))


def _signed_in_quiet(answers: Answers, tau: Tensor) -> Tensor:
    """Return tau or -tau: the one under which the network takes quiet noise for ordinary noise, as far as any does."""
    if answers.denoiser.process in ALL_NOISE:
        return _signed(answers, tau)
    return max((tau, -tau), key=lambda item: noise_gain(answers, item))


def _best(found: list[tuple[TriggerCandidate, Tensor]], ordinary: float) -> str:
    """Return the name of the strongest; of a patch the first, for the others know its place alone."""
    even, tau = found[0]
    if _stands_out_in_a_patch(even.parity, tau, ordinary):
        return even.name
    return max((candidate for candidate, _ in found), key=lambda item: _strength(item, ordinary)).name


def _strength(candidate: TriggerCandidate, ordinary: float) -> float:
    """Return how strongly a candidate breaks either law, on a common scale: for the choice of what is shown first.

    `ordinary` is the parity that clean networks of the process reach. They answer more evenly where the noise is too
    quiet, whatever the trigger.
    """
    even = candidate.parity / (2 if candidate.name == "quiet" else 1)
    return max(even / ordinary, candidate.violation / ORDINARY_VIOLATION)


def _counting(progress: Progress, options: InversionOptions, begin: float, end: float) -> Callable[[int, int], None]:
    """Return what counts a race as the part of the whole search from `begin` to `end`, shares of it."""
    whole = RACES * race_length(options)
    return lambda done, total: progress("search", round((begin + (end - begin) * done / total) * whole), whole)


def _is_noisy(signal: float) -> bool:
    return signal < MODERATE


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
