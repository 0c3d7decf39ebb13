"""Images of a model, plain and under a trigger, and how well the trigger works; the same seeds before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import Metric
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import find, steps_for, usual
from diffdefend_core.diffusion.samplers.trojdiff import NAMES, TROJDIFF_DDPM
from diffdefend_core.evaluation.interval import bootstrap, share
from diffdefend_core.evaluation.perceptual import Perceptual
from diffdefend_core.evaluation.success import squared_error, ssim, successes
from diffdefend_core.options import EvaluationOptions

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Backdoor:
    """A shift of the initial noise [C, H, W] and the picture it should paint [C, H, W] in [0, 1], by one sampler.

    `gamma` scales the noise beside the shift: a number or [C, H, W]. The sampler may be TrojDiff's own.
    """

    shift: Tensor
    target: Tensor
    sampler: str
    gamma: Tensor | float = 1.0

    @property
    def stochastic(self) -> bool:
        """Whether the sampler draws noise on the way."""
        return self.sampler == TROJDIFF_DDPM or (self.sampler not in NAMES and find(self.sampler).stochastic)

    @property
    def calls(self) -> int:
        """The number of network calls of a step."""
        return 1 if self.sampler in NAMES else find(self.sampler).calls

    def steps(self, denoiser: Denoiser, options: EvaluationOptions) -> int:
        """Return the number of steps that the sampler takes."""
        wanted = options.stochastic_steps if self.stochastic else options.deterministic_steps
        if self.sampler in NAMES:
            return min(wanted, len(denoiser.levels))
        return steps_for(denoiser, find(self.sampler), wanted)


def plain_images(denoiser: Denoiser, options: EvaluationOptions, seed: int, progress: Progress) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] from plain noise by the usual sampler.

    Raises FloatingPointError at NaN or Inf.
    """
    entry = usual(denoiser)
    images = generate(
        denoiser,
        options.samples,
        sampler=entry.name,
        steps=steps_for(denoiser, entry, options.sample_steps),
        seed=seed,
        progress=lambda done, total: progress("samples", done, total),
    )
    return denoiser.pictures(_finite(images).to(denoiser.device)).cpu()


def triggered_images(
    denoiser: Denoiser,
    backdoor: Backdoor,
    options: EvaluationOptions,
    seed: int,
    progress: Progress,
    count: int | None = None,
) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] painted from noise that carries the backdoor's shift.

    They are `count`, by default `options.triggered_samples`; fewer are the first ones of more.

    Raises FloatingPointError at NaN or Inf.
    """
    images = generate(
        denoiser,
        options.triggered_samples if count is None else count,
        sampler=backdoor.sampler,
        steps=backdoor.steps(denoiser, options),
        seed=seed,
        shift=backdoor.shift,
        gamma=backdoor.gamma,
        progress=lambda done, total: progress(f"triggered samples ({backdoor.sampler})", done, total),
    )
    return denoiser.pictures(_finite(images).to(denoiser.device)).cpu()


def _finite(images: Tensor) -> Tensor:
    if not images.isfinite().all():
        raise FloatingPointError("its images are not finite")
    return images


def medoid(images: Tensor) -> Tensor:
    """Return the image [C, H, W] with the smallest summed distance to the others: the target as the model paints it."""
    rows = images.flatten(1)
    return images[torch.cdist(rows, rows).sum(1).argmin()]


def success(
    images: Tensor, target: Tensor, options: EvaluationOptions, seed: int, perceptual: Perceptual | None = None
) -> dict[str, Metric]:
    """Return `asr`, `mse`, `ssim` and, if it can be measured, `lpips` of images [N, C, H, W] against [C, H, W]."""
    mean: Callable[[Tensor], float] = lambda rows: rows.mean().item()  # noqa: E731
    rows = {"mse": squared_error(images, target), "ssim": ssim(images, target)}
    if perceptual is not None:
        rows["lpips"] = perceptual(images, target)
    measured = {name: bootstrap(values, mean, seed=seed, resamples=options.resamples) for name, values in rows.items()}
    return {"asr": share(successes(images, target, options.asr_threshold)), **measured}


def success_curve(images: Tensor, target: Tensor, thresholds: Sequence[float]) -> tuple[Metric, ...]:
    """Return the attack success rate at each threshold of the squared error: it rises with the threshold."""
    return tuple(share(successes(images, target, threshold)) for threshold in thresholds)
