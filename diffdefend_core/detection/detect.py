"""The detector: an inverted trigger in, a verdict out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, Statistic, Verdict
from diffdefend_core.detection.calibration import RELATED_FLOOR, Calibration, standardise
from diffdefend_core.detection.decide import decide, score
from diffdefend_core.detection.statistics import paint, painting_cost, raw_statistics
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import steps_for, usual
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
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: DetectionOptions,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Paint under the candidates and return the raw statistics; nothing here depends on a calibration."""
    paintings = paint(
        suspect,
        inverted,
        triggers,
        options,
        seed=seed,
        progress=lambda done, total: progress("painting", done, total),
    )
    sampler = usual(suspect)
    steps = steps_for(suspect, sampler, options.deterministic_steps)
    drawn = generate(suspect, options.samples, sampler=sampler.name, steps=steps, seed=seed)
    plain = suspect.pictures(drawn.to(suspect.device)).cpu()
    # a collapse that is not a number comes first: the verdict must speak of it
    shown = max(paintings, key=lambda item: (math.isnan(item.collapse), item.collapse))
    return Measurement(
        statistics=raw_statistics(inverted, shown, plain),
        sampler=shown.sampler,
        triggered=shown.triggered,
        plain=plain,
        forward_equivalents=options.samples * steps * sampler.calls + painting_cost(suspect, inverted, options),
    )


def judge(
    measurement: Measurement,
    inverted: InvertedTrigger,
    calibration: Calibration,
    *,
    limit: float,
    family: str,
    shape: tuple[int, ...],
    process: str,
    score: Callable[[Mapping[str, Statistic]], float] = score,
) -> Verdict:
    """Return the verdict of a measurement against clean models; the model itself is left out of its calibration.

    A model of another family or shape than those is judged against the ones of its process, with a wider spread: its
    statistics are relative to its own twin and to the opposite shift, which is half a calibration by itself. Without
    any of its process it can at best be inconclusive.
    """
    others = calibration.without(inverted.model_digest)
    kin, floor = others.kin(family, shape, process)
    used = kin or others.models
    statistics = standardise(used, measurement.statistics, limit, floor if kin else RELATED_FLOOR)
    basis = f"{len(used)} clean models" + (" of other kinds and its own controls" if floor >= RELATED_FLOOR else "")
    word, chance, reasons = decide(statistics, limit=limit, basis=basis, covered=bool(kin), score=score)
    return Verdict(
        model_digest=inverted.model_digest,
        word=word,
        probability=chance,
        statistics=statistics,
        reasons=reasons,
        calibration_digest=calibration.digest(),
        calibration_models=tuple(model.name for model in used),
        seeds=(inverted.seed,),
        forward_equivalents=inverted.forward_equivalents + measurement.forward_equivalents,
    )
