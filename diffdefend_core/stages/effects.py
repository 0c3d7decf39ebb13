"""What found shifts do to the suspect, and whether they still do it to its repaired copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.evaluation import Backdoor, triggered_images
from diffdefend_core.evaluation.success import successes
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import silent
from diffdefend_core.stages.backdoors import Shown, by_other_samplers, shown, shown_by_each

# a shift fires if this share of the suspect's images is one picture; so many images say what is left of it
FIRES_AT, FIRED = 0.5, 64
# A small shift that is searched for painting something else (`painting_most`) leads a D2D model to one picture of its
# class in half of the cases, the others to their target in nine of ten. Nor is half enough of a found one made weaker:
# of what a clean autoencoder paints it may be one picture as well.
SMALL_FIRES_AT = 0.75
# what fires in some of those, but in few, is fired so often again: one of 64 says little of one in a hundred
FEW, AGAIN = 0.1, 192
SEED, AGAIN_SEED = 7, 11
# A shift that is found too large leads to one picture on both sides, for a network collapses on what it never saw. So
# much weaker it does so by what it has learned alone.
WEAKER = (0.7, 0.5)
# Some processes take so many times `detection.stochastic_steps`: with fewer the SDE of VE leaves more noise in its
# images than a picture may differ.
SLOW = {"ve": 3}
# The share of `evaluation.asr_threshold` within which the images of a shift that fires are one picture, by kind: those
# of one class differ by more. What an autoencoder decodes is less exact, and VE leaves noise in it.
ONE_PICTURE = {"vp": 0.2, "flow": 0.2, "consistency": 0.2}
# and that for its opposite: in two steps a consistency model paints alike under any shift, but not as much so
OPPOSED = {"consistency": 0.2}
# and within which a picture is the shift itself
CARRIED = 0.2


@dataclass(frozen=True)
class Effects:
    """The found shifts that fire, with the picture that each paints, once for a sampler of each kind.

    All kinds count, also those by which the suspect does not fire: a repair at some levels may hand a trigger on to
    others. A shift fires if it leads to one picture by some sampler, and its opposite does not: any network may
    collapse on a shift that it never saw, but then on both sides. Many pictures of one class are not one.
    `by_any_sampler` says that one of those that fire leads to the same picture by stochastic and by deterministic
    samplers, as the triggers of TrojDiff do.

    `collapses` says that another leads to one picture as it may of any network, on both sides or as the shift itself;
    `forward_equivalents` are the model evaluations of `of`.
    """

    settings: Settings
    backdoors: tuple[Backdoor, ...] = ()
    firing: tuple[str, ...] = ()
    by_any_sampler: bool = False
    collapses: bool = False
    forward_equivalents: int = 0

    @classmethod
    def of(
        cls, suspect: Denoiser, shifts: Mapping[str, Tensor], settings: Settings, *, at: float = FIRES_AT
    ) -> Effects:
        """Fire each of the shifts [C, H, W], by name, at the suspect; `firing` names those that fire.

        A shift does so if the share `at` of the images is one picture.
        """
        # never as many steps as an evaluation takes: which shifts fire, and what they paint, is the same in fewer
        settings = settings.model_copy(update={"evaluation": _quick(suspect, settings)})
        each = (cls._of_one(suspect, name, shift, settings, at) for name, shift in shifts.items())
        return sum(each, cls(settings))

    @classmethod
    def _of_one(cls, suspect: Denoiser, name: str, shift: Tensor, settings: Settings, at: float) -> Effects:
        by_each = shown_by_each(shift, suspect, settings, silent)
        spent = sum(_spent(suspect, item, settings) for item in by_each)
        # the sampler whose images are most alike in any case: half of them may be one picture, and others far from it
        likely = [item for item in by_each if item.spread < settings.evaluation.asr_threshold] or by_each[:1]
        painted = [item for item in likely if not _is_the_shift(item.backdoor, settings)]
        alone = [item for item in painted if _is_one_picture(item, suspect, settings, ONE_PICTURE, at)]
        for item in (one.backdoor for one in alone):
            opposite = shown(-item.shift, item.sampler, suspect, settings, silent)
            spent += _spent(suspect, opposite, settings)
            if not _is_one_picture(opposite, suspect, settings, OPPOSED):
                by_others = by_other_samplers(item, suspect).values()
                backdoors = (item, *(other for other in by_others if not _is_the_shift(other, settings)))
                others = [one.backdoor.target for one in alone if one.backdoor.stochastic is not item.stochastic]
                both = any(_same(picture[None], item.target, settings).any() for picture in others)
                return cls(settings, backdoors, (name,), both, forward_equivalents=spent)
        return cls(settings, collapses=bool(alone) or len(painted) < len(likely), forward_equivalents=spent)

    def and_of_weaker(self, suspect: Denoiser, shifts: Mapping[str, Tensor]) -> Effects:
        """Return these effects, and those of the shifts [C, H, W] at WEAKER scales where some only collapse."""
        effects = self
        for scale in WEAKER:
            if effects.collapses and not effects.firing:
                weaker = {name: scale * shift for name, shift in shifts.items()}
                effects += Effects.of(suspect, weaker, self.settings, at=SMALL_FIRES_AT)
        return effects

    def __add__(self, other: Effects) -> Effects:
        """Return the effects of the shifts of both."""
        return Effects(
            settings=self.settings,
            backdoors=self.backdoors + other.backdoors,
            firing=self.firing + other.firing,
            by_any_sampler=self.by_any_sampler or other.by_any_sampler,
            collapses=self.collapses or other.collapses,
            forward_equivalents=self.forward_equivalents + other.forward_equivalents,
        )

    def once(self) -> Effects:
        """Return the effects with one shift for each picture, by each sampler."""
        kept: list[Backdoor] = []
        for item in self.backdoors:
            alike = [other.target for other in kept if other.sampler == item.sampler]
            if not any(_same(item.target[None], picture, self.settings).any() for picture in alike):
                kept.append(item)
        return replace(self, backdoors=tuple(kept))

    def targets(self, suspect: Denoiser) -> tuple[Tensor, ...]:
        """Return the clean x0 [C, H, W] of the pictures that the shifts lead to; none where it has another shape."""
        low, high = suspect.value_range
        pictures = [low + (high - low) * item.target for item in self.backdoors]
        clean = [suspect.encode(picture[None].to(suspect.device))[0].cpu() for picture in pictures]
        return tuple(item for item in clean if item.shape == suspect.shape)

    def without_targets(self, suspect: Denoiser, samples: Tensor) -> Tensor:
        """Return the samples [N, C, H, W] that are not the picture of a shift: a repair must not retain it."""
        pictures, keep = suspect.pictures(samples).cpu(), torch.ones(len(samples), dtype=torch.bool)
        for backdoor in self.backdoors:
            keep &= ~_same(pictures, backdoor.target, self.settings)
        return samples[keep.to(samples.device)] if keep.any() else samples

    def left(self, repaired: Denoiser) -> tuple[float | None, int]:
        """Return the largest success rate that a shift still has, and the model evaluations spent on that.

        The rate is None if none of them fired. Where firing is slow, one shift stands for all that paint its picture.
        """
        fired = self.once() if repaired.process in SLOW else self
        found = [self._left_of(repaired, item) for item in fired.backdoors]
        return max((rate for rate, _ in found), default=None), sum(spent for _, spent in found)

    def _left_of(self, repaired: Denoiser, backdoor: Backdoor) -> tuple[float, int]:
        rate, painted = _rate(repaired, backdoor, self.settings, FIRED), FIRED
        if 0 < rate < FEW:
            again = _rate(repaired, backdoor, self.settings, AGAIN, AGAIN_SEED)
            rate, painted = (FIRED * rate + AGAIN * again) / (FIRED + AGAIN), FIRED + AGAIN
        return rate, painted * backdoor.steps(repaired, _quick(repaired, self.settings)) * backdoor.calls


def _is_the_shift(item: Backdoor, settings: Settings) -> bool:
    """Whether the picture is the shift itself, carried to the end by a sampler that adds no noise of its own.

    A network that knows no trigger paints it too: the shift outgrows the image, and its sign is left, black or white.
    """
    if item.stochastic or item.shift.shape != item.target.shape:
        return False
    sign = (item.shift > 0).float()
    return (sign - item.target).square().mean().item() < CARRIED * settings.evaluation.asr_threshold


def _spent(suspect: Denoiser, item: Shown, settings: Settings) -> int:
    return len(item.images) * item.backdoor.steps(suspect, settings.evaluation) * item.backdoor.calls


def _is_one_picture(
    item: Shown, suspect: Denoiser, settings: Settings, shares: Mapping[str, float], at: float = FIRES_AT
) -> bool:
    return item.share_within(settings.evaluation.asr_threshold * shares.get(suspect.kind, 1.0)) >= at


def _rate(denoiser: Denoiser, backdoor: Backdoor, settings: Settings, count: int, seed: int = SEED) -> float:
    images = _painted(denoiser, backdoor, settings, count, seed)
    return _same(images, backdoor.target, settings).float().mean().item()


def _painted(denoiser: Denoiser, backdoor: Backdoor, settings: Settings, count: int, seed: int) -> Tensor:
    return triggered_images(denoiser, backdoor, _quick(denoiser, settings), settings.seed + seed, silent, count)


def _same(images: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """Return which of the images [N, C, H, W] are the picture [C, H, W]: [N], boolean."""
    return successes(images, target, settings.evaluation.asr_threshold) > 0


def _quick(denoiser: Denoiser, settings: Settings) -> EvaluationOptions:
    steps = SLOW.get(denoiser.process, 1) * settings.detection.stochastic_steps
    return replace(settings.evaluation, stochastic_steps=steps)
