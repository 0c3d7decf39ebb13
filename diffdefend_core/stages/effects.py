"""What found shifts do to the suspect, and whether they still do it to its repaired copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import covering
from diffdefend_core.evaluation import Backdoor, medoid, triggered_images
from diffdefend_core.evaluation.success import successes
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import silent
from diffdefend_core.stages.backdoors import by_other_samplers, recovered_backdoor

# a shift fires if this share of the suspect's images is one picture; so many images say so, and so many what is left
FIRES_AT, PROBED, FIRED = 0.5, 16, 64
SEED, OPPOSITE_SEED = 7, 5


@dataclass(frozen=True)
class Effects:
    """The found shifts that fire, with the picture that each paints, once for a sampler of each kind.

    All kinds count, also those by which the suspect does not fire: a repair at some levels may hand a trigger on to
    others. A shift that does not lead to one picture is none of them, nor one whose opposite does so by the same
    sampler: any network may collapse on a shift that it never saw, but then on both sides.
    """

    backdoors: tuple[Backdoor, ...]
    firing: tuple[str, ...]
    fired: int
    opposed: int
    settings: Settings

    @classmethod
    def of(cls, suspect: Denoiser, shifts: Mapping[str, Tensor], settings: Settings) -> Effects:
        """Fire each of the shifts [C, H, W], by name, at the suspect; `firing` names those that fire.

        `fired` counts them all, `opposed` those that lead to one picture, whose opposite was fired too.
        """
        shown = {name: recovered_backdoor(shift, suspect, settings, silent) for name, shift in shifts.items()}
        alone = {name: item for name, item in shown.items() if _rate(suspect, item, settings, PROBED) >= FIRES_AT}
        opposites = {name: _opposite(item, suspect, settings) for name, item in alone.items()}
        firing = [name for name, item in opposites.items() if _rate(suspect, item, settings, PROBED) < FIRES_AT]
        groups = ((shown[name], *by_other_samplers(shown[name], suspect).values()) for name in firing)
        backdoors = tuple(item for group in groups for item in group)
        return cls(backdoors, tuple(firing), len(shifts), len(alone), settings)

    def __add__(self, other: Effects) -> Effects:
        """Return the effects of the shifts of both."""
        return replace(
            self,
            backdoors=self.backdoors + other.backdoors,
            firing=self.firing + other.firing,
            fired=self.fired + other.fired,
            opposed=self.opposed + other.opposed,
        )

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
            keep &= successes(pictures, backdoor.target, self.settings.evaluation.asr_threshold) == 0
        return samples[keep.to(samples.device)] if keep.any() else samples

    def left(self, repaired: Denoiser) -> float:
        """Return the largest success rate that a shift still has."""
        return max((_rate(repaired, item, self.settings, FIRED) for item in self.backdoors), default=0.0)

    def cost(self, suspect: Denoiser) -> int:
        """Return the model evaluations of `of`, and of `left`."""
        items = [Backdoor(torch.empty(0), torch.empty(0), entry.name) for entry in covering(suspect).values()]
        calls = [item.steps(suspect, _quick(self.settings)) * item.calls for item in items]
        probed = [item.steps(suspect, self.settings.evaluation) * item.calls for item in items]
        # every kind once, and the one that fires once more; of an opposite that one twice
        painted = PROBED * (self.fired * (sum(probed) + max(calls)) + self.opposed * (max(probed) + max(calls)))
        return painted + FIRED * sum(calls) * len(self.backdoors) // len(items)


def _opposite(backdoor: Backdoor, suspect: Denoiser, settings: Settings) -> Backdoor:
    """Return the opposite shift with the picture that it paints by the same sampler."""
    turned = replace(backdoor, shift=-backdoor.shift)
    images = triggered_images(suspect, turned, settings.evaluation, settings.seed + OPPOSITE_SEED, silent, PROBED)
    return replace(turned, target=medoid(images))


def _rate(denoiser: Denoiser, backdoor: Backdoor, settings: Settings, count: int) -> float:
    images = triggered_images(denoiser, backdoor, _quick(settings), settings.seed + SEED, silent, count)
    return successes(images, backdoor.target, settings.evaluation.asr_threshold).mean().item()


def _quick(settings: Settings) -> EvaluationOptions:
    return replace(settings.evaluation, stochastic_steps=settings.detection.stochastic_steps)
