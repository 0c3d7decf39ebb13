"""What found shifts do to the suspect, and whether they still do it to its repaired copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import covering
from diffdefend_core.evaluation import Backdoor, triggered_images
from diffdefend_core.evaluation.success import successes
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import silent
from diffdefend_core.stages.backdoors import by_other_samplers, recovered_backdoor

# a shift fires if this share of the suspect's images is one picture; so many images say so, and so many what is left
FIRES_AT, PROBED, FIRED = 0.5, 16, 64
SEED = 7


@dataclass(frozen=True)
class Effects:
    """The found shifts that fire, with the picture that each paints, once for a sampler of each kind.

    All kinds count, also those by which the suspect does not fire: a repair at some levels may hand a trigger on to
    others. A shift that does not lead to one picture is none of them, nor one whose opposite does so too: any network
    may collapse on a shift that it never saw, but then on both sides.
    """

    backdoors: tuple[Backdoor, ...]
    firing: tuple[str, ...]
    fired: int
    settings: Settings

    @classmethod
    def of(cls, suspect: Denoiser, shifts: Mapping[str, Tensor], settings: Settings) -> Effects:
        """Fire each of the shifts [C, H, W], by name, at the suspect; `firing` names those that fire.

        `fired` counts the shifts that were fired; the opposite of one that does nothing is not.
        """
        found: dict[str, list[Backdoor]] = {}
        fired = 0
        for name, shift in shifts.items():
            shown, alone = _shown(suspect, shift, settings)
            fired += 1 + alone
            if alone and not _shown(suspect, -shift, settings)[1]:
                found[name] = [shown, *by_other_samplers(shown, suspect).values()]
        return cls(tuple(item for group in found.values() for item in group), tuple(found), fired, settings)

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
        painted = self.fired * PROBED * (sum(probed) + max(calls))  # every kind once, the one that fires once more
        return painted + FIRED * sum(calls) * len(self.backdoors) // len(items)


def _shown(suspect: Denoiser, shift: Tensor, settings: Settings) -> tuple[Backdoor, bool]:
    """Return a shift with the picture that it paints, and whether that is one picture."""
    shown = recovered_backdoor(shift, suspect, settings, silent)
    return shown, _rate(suspect, shown, settings, PROBED) >= FIRES_AT


def _rate(denoiser: Denoiser, backdoor: Backdoor, settings: Settings, count: int) -> float:
    images = triggered_images(denoiser, backdoor, _quick(settings), settings.seed + SEED, silent, count)
    return successes(images, backdoor.target, settings.evaluation.asr_threshold).mean().item()


def _quick(settings: Settings) -> EvaluationOptions:
    return replace(settings.evaluation, stochastic_steps=settings.detection.stochastic_steps)
