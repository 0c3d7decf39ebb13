"""The backdoors that the evaluation fires: the recovered one of a flagged model, the known one of a red-team model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import covering, find, probing
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation import Backdoor, medoid, triggered_images
from diffdefend_core.evaluation.success import successes
from diffdefend_core.progress import Progress

# images by each sampler, to see which one the recovered trigger fires with
PROBE_SAMPLES = 16


@dataclass(frozen=True)
class Shown:
    """What a shift leads to by one sampler: `images` [N, C, H, W] in [0, 1], and the backdoor to their medoid."""

    backdoor: Backdoor
    images: Tensor

    @property
    def spread(self) -> float:
        """The mean squared error of the images to the medoid."""
        return (self.images - self.backdoor.target).square().mean().item()

    def share_within(self, threshold: float) -> float:
        """Return the share of the other images with a squared error to it below `threshold`."""
        alike = successes(self.images, self.backdoor.target, threshold).sum().item()
        return (alike - 1) / max(1, len(self.images) - 1)


def shown(
    shift: Tensor, sampler: str, model: Denoiser, settings: Settings, progress: Progress, count: int = PROBE_SAMPLES
) -> Shown:
    """Return what the shift [C, H, W] leads to by a sampler, in `count` images."""
    probe = Backdoor(shift=shift, target=torch.empty(0), sampler=sampler)
    images = triggered_images(model, probe, settings.evaluation, settings.seed + 5, progress, count)
    return Shown(replace(probe, target=medoid(images)), images)


def recovered_backdoor(shift: Tensor, model: Denoiser, settings: Settings, progress: Progress) -> Backdoor:
    """Return the backdoor as the model itself shows it: by the sampler whose images agree most with their medoid."""
    return shown_by_each(shift, model, settings, progress, probe_count(settings))[0].backdoor


def shown_by_each(
    shift: Tensor, model: Denoiser, settings: Settings, progress: Progress, count: int = PROBE_SAMPLES
) -> list[Shown]:
    """Return what the shift [C, H, W] leads to by each probed sampler; what is most alike comes first."""
    found = (shown(shift, entry.name, model, settings, progress, count) for entry in probing(model))
    return sorted(found, key=lambda item: item.spread)


def probe_count(settings: Settings) -> int:
    """Return the number of images by each sampler that is probed."""
    return min(PROBE_SAMPLES, settings.evaluation.triggered_samples)


def known_backdoor(content: bytes, model: Denoiser, uri: str) -> Backdoor:
    """Return the planted backdoor of a red-team model. Raises InputError if the file is not one of its shape."""
    try:
        tensors = load_tensors(content)
        trigger, target = tensors["trigger"], tensors["target"]
        gamma = tensors.get("gamma", torch.ones(model.shape))
    except (SafetensorError, KeyError) as error:
        trigger = target = gamma = torch.empty(0)
        found = f"known trigger {uri} cannot be read ({error})"
    else:
        found = f"known trigger {uri} with shapes {tuple(trigger.shape)}, {tuple(target.shape)}, {tuple(gamma.shape)}"
    if trigger.shape != model.shape or gamma.shape != model.shape or target.shape != model.picture_shape:
        raise InputError(
            found,
            expected=f"safetensors with `trigger` (and `gamma`) {model.shape} and `target` {model.picture_shape}",
            action="give the file that belongs to this model, or none",
        )
    low, high = model.value_range
    return Backdoor(
        shift=trigger,
        target=(target - low) / (high - low),
        sampler=_sampler_of(content) or probing(model)[0].name,
        gamma=gamma,
    )


def by_other_samplers(backdoor: Backdoor, model: Denoiser) -> dict[str, Backdoor]:
    """Return the backdoor as the sampler of each other kind would fire it: by kind, without its own sampler."""
    others = {kind: entry.name for kind, entry in covering(model).items() if entry.name != backdoor.sampler}
    return {kind: replace(backdoor, sampler=name) for kind, name in others.items()}


def missing_kinds(model: Denoiser) -> str:
    """Return a sentence on the kinds of samplers that no sampler of the model's process is of, or nothing."""
    kinds = [kind for kind in ("stochastic", "deterministic", "multistep") if kind not in covering(model)]
    return f"No {' or '.join(kinds)} sampler fits a model of the process {model.process}." if kinds else ""


def _sampler_of(content: bytes) -> str:
    """Return the sampler that the metadata of a safetensors file names, or nothing."""
    length = int.from_bytes(content[:8], "little")
    name = str(json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("sampler", ""))
    return name if name in ("", *NAMES) else find(name).name
