"""What a repair removes of a flagged model: the shifts that the scan found, and what else fires; where, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, PurifiedModel, TriggerCandidate
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.inversion import own_samples
from diffdefend_core.inversion.attractors import ALIKE, SMALL_RMS, Attractors, attractors, in_less_noise, painting_most
from diffdefend_core.inversion.patch import in_patch, is_patch
from diffdefend_core.inversion.picture import led_again
from diffdefend_core.inversion.refine import ALL_NOISE, cosine
from diffdefend_core.progress import Progress
from diffdefend_core.purification import Removal
from diffdefend_core.purification.losses import QUIET_SHARE
from diffdefend_core.stages.effects import SMALL_FIRES_AT, Effects
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import read_triggers
from diffdefend_core.stages.model import check_repairable, open_denoiser

RESCAN, SMALL = "rescan/", "small"
# a shift breaks a law, and not only as any shift does, above this violation or this multiple of the control's parity
ORDINARY_VIOLATION, STANDING_OUT = 0.1, 1.5
# a shift that fires, or the best if none does, has so many times the rows of one that only breaks a law
MAIN_SHARE = 4
# what a shift turns to in less noise has so many times the rows
SIDE_SHARE = 2
# Where a shift is removed, by alpha / sigma. The noisy end alone is not enough: a network that takes the trigger for
# noise there hands it on to the levels below, where a deterministic sampler would paint the target after all. In less
# noise than that a suspect answers a trigger as a clean network does.
REMOVAL_SIGNALS = (0.005, 3.0)
# A consistency model has no levels below that it hands a trigger on to: it begins in the noisiest ones, and what comes
# after is begun with fresh noise.
REMOVAL_AT_ONCE = (0.005, 0.1)
# A trigger of a flow that leads to no single picture chooses among many: in much noise, where the little that is left
# of it decides. Above that the suspect with its trigger is nearer to a clean network than the goal.
REMOVAL_OF_CHOICE = (0.005, 0.3)
# How far beyond its goals a removal aims, as a share of what falls short of them: a first one, of triggers that
# deterministic samplers carry on from level to level, so that what is left at each adds up; one of triggers that choose
# among pictures; and a further round
AHEAD, OF_CHOICE, FURTHER = 0.1, 0.3, 1.0
# The share of quieter noise where no shift of a DDPM leads to one picture, but for patches: there the noise may be as
# much of the trigger as the shift (TrojDiff's D2D).
QUIET_UNLED = 0.6
# How many times the errors in much noise count, at most: there, where a trigger of a DDPM has sides, of latents, and of
# VE where a shift leads to a picture. What is painted is decided in noise of which the loss of a DDPM hardly sees
# anything, and a flow's does. Small triggers of pixels and patches cost more of the images that way.
IN_NOISE = 20.0


@dataclass(frozen=True)
class Suspect:
    """The flagged model in `folder`, `samples` of its own [M, C, H, W], and what all rounds remove of it.

    Those are `shifts` [C, H, W], each as often as it counts, `further` of them triggers that the scan did not find;
    `effects` is what they do. They are `small` in all their shapes, or `sided`, or neither.
    """

    denoiser: Denoiser
    folder: Path
    samples: Tensor
    shifts: list[Tensor]
    effects: Effects
    small: bool
    sided: bool
    further: int
    forward_equivalents: int

    @property
    def leads(self) -> bool:
        """Whether some shift leads to one picture: none does of an attack that paints any picture of a class (D2D)."""
        return bool(self.effects.firing) or self.sided

    @property
    def chooses(self) -> bool:
        """Whether no shift of a flow leads to one picture."""
        return not self.leads and self.denoiser.process == "flow"

    @property
    def chooses_by_noise(self) -> bool:
        """Whether no shift of a DDPM, latent or not, leads to one picture; a patch, whose pixels are few, aside."""
        unled = not self.leads and self.denoiser.process == "vp"
        return unled and not all(is_patch(shift) for shift in self.shifts)


@dataclass(frozen=True)
class Aims:
    """What one round removes, how far `beyond` its goals it aims, the pictures that it unlearns, whether it settles.

    `targets` [C, H, W] are clean x0: those of small triggers, and where `_pictured` says so. Errors in much noise count
    up to `in_noise` times.
    """

    removals: list[Removal]
    targets: tuple[Tensor, ...]
    beyond: float
    settles: bool
    in_noise: float


def suspect_in(folder: Path, trigger_uri: str, settings: Settings, progress: Progress) -> Suspect:
    """Return the model in `folder` and what is to be removed of it: what the scan found, and what else fires."""
    options = settings.purification
    best = read_record(InvertedTrigger, trigger_uri, "inverted_trigger").best
    denoiser = open_denoiser(folder, settings.device, settings.adapter)
    check_repairable(denoiser, folder, settings.adapter)
    samples = own_samples(denoiser, options.own_samples, options.own_steps, settings.seed + 2, progress)
    found = _once(_outstanding(trigger_uri), best)
    turned = attractors(denoiser, samples, settings.inversion, seed=settings.seed)
    others = _unlike(turned.shifts, found)
    effects = Effects.of(denoiser, found | others, settings)
    further = {name: shift for name, shift in others.items() if name in effects.firing}
    main, again = effects.firing or (best,), _led_again(denoiser, samples, effects, settings)
    shares = {name: MAIN_SHARE if name in main and not again else 1 for name in found}
    # the shifts that a scan finds are mostly one trigger in several shapes; a further one counts as much as all of them
    shares |= dict.fromkeys(further, MAIN_SHARE * max(1, sum(name in main for name in found)))
    shifts = [shift for name, shift in (found | further).items() for _ in range(shares[name])]
    shifts += [shift for item in again for shift in item.shifts for _ in range(MAIN_SHARE)]
    # what is left of a patch is its target, not a side of it
    turning = [shift for name, shift in (found | further).items() if name in main and not is_patch(shift)]
    sides = [in_less_noise(denoiser, samples, shift, settings.inversion, seed=settings.seed) for shift in turning]
    shifts += [shift for side in sides for shift in side.shifts for _ in range(SIDE_SHARE)]
    sided = bool(sides) and all(side.shifts for side in sides)  # the triggers of deterministic samplers have none
    small, tried = Attractors((), 0), Effects(settings)
    if turning and not sided and not effects.firing:  # a large shift may lead to one picture on both sides
        small = painting_most(denoiser, samples, turning[0], settings.inversion, seed=settings.seed)
        named = zip((SMALL,), small.shifts, strict=False)  # flows have none
        shrunk = {name: SMALL_RMS * shift / rms(shift) for name, shift in named}
        tried = Effects.of(denoiser, shrunk, settings, at=SMALL_FIRES_AT)
    shifts += small.shifts * MAIN_SHARE  # what it paints may be one of many pictures
    effects = (effects + tried).and_of_weaker(denoiser, found | others)
    searched = sum(item.forward_equivalents for item in (turned, small, *sides, *again))
    return Suspect(
        denoiser=denoiser,
        folder=folder,
        samples=samples,
        shifts=shifts,
        effects=effects,
        small=bool(tried.firing),
        sided=sided,
        further=len(further),
        forward_equivalents=options.own_samples * options.own_steps + searched + effects.forward_equivalents,
    )


def _led_again(suspect: Denoiser, samples: Tensor, effects: Effects, settings: Settings) -> list[Attractors]:
    """Return for each picture that a shift of a consistency model leads to what other searches of it have in common."""
    if suspect.process != "consistency":
        return []
    pictures = effects.once().targets(suspect)
    return [
        led_again(suspect, samples, picture.to(samples), settings.inversion, seed=settings.seed + number)
        for number, picture in enumerate(pictures)
    ]


def aims_of(suspect: Suspect, earlier: tuple[str, ...]) -> Aims:
    """Return what a round removes: that of all rounds, and what the rescans of earlier ones found."""
    pictured = suspect.small or _pictured(suspect.denoiser, suspect.effects, earlier)
    targets = suspect.effects.targets(suspect.denoiser) if pictured else ()
    shifts = suspect.shifts + [shift for uri in earlier for shift in _outstanding(uri, RESCAN).values()]
    # only a trigger of stochastic samplers may lie on another background
    removals = [
        Removal(shift, _signals(suspect), any_background=suspect.sided, small=suspect.small, quiet=_quiet(suspect))
        for shift in shifts
    ]
    return Aims(
        removals=removals,
        targets=targets,
        beyond=_beyond(suspect, earlier),
        settles=not earlier and (bool(targets) or suspect.chooses),
        in_noise=_in_noise(suspect),
    )


def _beyond(suspect: Suspect, earlier: tuple[str, ...]) -> float:
    if earlier:
        return FURTHER
    if suspect.chooses:
        return OF_CHOICE
    return 0.0 if suspect.sided else AHEAD


def _signals(suspect: Suspect) -> tuple[float, float]:
    if suspect.denoiser.process == "consistency":
        return REMOVAL_AT_ONCE
    return REMOVAL_OF_CHOICE if suspect.chooses else REMOVAL_SIGNALS


def _quiet(suspect: Suspect) -> float:
    return QUIET_UNLED if suspect.chooses_by_noise else QUIET_SHARE


def _in_noise(suspect: Suspect) -> float:
    denoiser = suspect.denoiser
    of_vp = denoiser.kind == "latent vp" or suspect.sided or suspect.chooses_by_noise
    counts = {"vp": of_vp, "ve": suspect.leads}
    return IN_NOISE if counts.get(denoiser.process) else 1.0


def _pictured(suspect: Denoiser, effects: Effects, earlier: tuple[str, ...]) -> bool:
    """Whether the pictures of any trigger are unlearned: of flows, of one of any sampler, where a round was not enough.

    It takes rows from the triggers, and for most of them the images suffer without need.
    """
    left = bool(earlier) and not read_record(PurifiedModel, earlier[-1], "purified").is_silent
    return left or effects.by_any_sampler or suspect.process in ALL_NOISE


def _outstanding(uri: str, folder: str = "") -> dict[str, Tensor]:
    """Return the shifts [C, H, W] that break one of the two laws, by name; others would dilute the batch.

    The best one in any case, unless the search is that of a rescan, in `folder`.
    """
    found = read_record(InvertedTrigger, uri, f"{folder}inverted_trigger")
    triggers = read_triggers(uri, folder)
    names = [item.name for item in found.candidates if (item.name == found.best and not folder) or _stands_out(item)]
    return {name: triggers[name] for name in names}


def _once(found: dict[str, Tensor], best: str) -> dict[str, Tensor]:
    """Return the found shifts without those that are the best one, a patch, in other words: of it they know the place.

    They would take the rows of what is known better.
    """
    return {name: shift for name, shift in found.items() if name == best or not in_patch(shift, found[best])}


def _unlike(shifts: tuple[Tensor, ...], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shifts that are none of the found ones, by name."""
    return {
        f"further-{number}": shift
        for number, shift in enumerate(shifts, 1)
        if not any(cosine(shift, other) > ALIKE or in_patch(shift, other) for other in found.values())
    }


def _stands_out(item: TriggerCandidate) -> bool:
    return item.violation > ORDINARY_VIOLATION or item.parity > STANDING_OUT * item.control > 0
