"""The detector: an inverted trigger in, a verdict out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, Verdict
from diffdefend_core.detection.calibration import Calibration, standardise
from diffdefend_core.detection.decide import decide
from diffdefend_core.detection.statistics import paint, painting_steps, raw_statistics
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import probing, usual
from diffdefend_core.options import DetectionOptions

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measurement:
    """Raw statistics, the sampler that fires best, and images [N, C, H, W] in [0, 1] with and without the shift."""

    statistics: dict[str, float]
    sampler: str
    triggered: Tensor
    plain: Tensor
    forward_equivalents: int


def measure(
    suspect: Denoiser,
    reference: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: DetectionOptions,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Paint under the best candidate and return the raw statistics; nothing here depends on a calibration."""
    best = next(item for item in inverted.candidates if item.name == inverted.best)
    painting = paint(
        suspect,
        reference,
        triggers[best.name],
        options,
        seed=seed,
        progress=lambda done, total: progress("painting", done, total),
    )
    sampler = usual(suspect)
    steps = painting_steps(suspect, sampler, options)
    plain = generate(suspect, options.samples, sampler=sampler.name, steps=steps, seed=seed)
    painted = steps * sampler.calls
    painted += 2 * sum(entry.calls * painting_steps(suspect, entry, options) for entry in probing(suspect))
    return Measurement(
        statistics=raw_statistics(best, painting),
        sampler=painting.sampler,
        triggered=painting.suspect,
        plain=suspect.pictures(plain.to(suspect.device)).cpu(),
        forward_equivalents=options.samples * painted,
    )


def judge(
    measurement: Measurement,
    inverted: InvertedTrigger,
    calibration: Calibration,
    options: DetectionOptions,
    *,
    family: str,
    shape: tuple[int, ...],
) -> Verdict:
    """Return the verdict of a measurement against clean models; the model itself is left out of its calibration."""
    others = calibration.without(inverted.model_digest)
    statistics = standardise(others, measurement.statistics, options.limit)
    word, chance, reasons = decide(statistics, limit=options.limit, covered=others.covers(family, shape))
    return Verdict(
        model_digest=inverted.model_digest,
        word=word,
        probability=chance,
        statistics=statistics,
        reasons=reasons,
        calibration_digest=calibration.digest(),
        calibration_models=tuple(model.name for model in others.models),
        seeds=(inverted.seed,),
        forward_equivalents=inverted.forward_equivalents + measurement.forward_equivalents,
    )
