"""How far generated images are from a reference: FID, KID, precision and recall, each with n and an interval."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffdefend_core.artifacts import Metric
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation.features import Extractor
from diffdefend_core.evaluation.frechet import frechet_distance_of_rows
from diffdefend_core.evaluation.interval import bootstrap, share
from diffdefend_core.evaluation.neighbours import K, covered, radii
from diffdefend_core.evaluation.reference import Reference
from diffdefend_core.options import EvaluationOptions


def check_counts(options: EvaluationOptions) -> None:
    """Raise InputError if the options ask for fewer samples than a metric needs: before anything is painted."""
    least = {"samples": K + 1, "triggered_samples": 2, "resamples": 2, "other_samples": 0}
    least |= dict.fromkeys(("sample_steps", "stochastic_steps", "deterministic_steps"), 1)
    for name, number in least.items():
        if getattr(options, name) < number:
            raise InputError(
                f"evaluation.{name} is {getattr(options, name)}",
                expected=f"at least {number}",
                action="ask for more: intervals get useful from some hundreds on",
            )
    if not all(0 < threshold <= 1 for threshold in (options.asr_threshold, *options.asr_thresholds)):
        raise InputError(
            f"evaluation.asr_threshold is {options.asr_threshold}, asr_thresholds {list(options.asr_thresholds)}",
            expected="squared errors of pictures in [0, 1]: above 0, at most 1",
            action="set them, for example 0.05",
        )


def quality(
    images: Tensor, reference: Reference, extractor: Extractor, options: EvaluationOptions, seed: int
) -> dict[str, Metric]:
    """Return `fid` of images [N, C, H, W] in [0, 1], and where the reference has features `kid`, `precision`, `recall`.

    The reference is taken as it is: intervals show the chance in the images alone, and for the recall that in the
    reference. Raises ValueError with fewer images than a metric needs.
    """
    features = extractor.features(images)
    fid = bootstrap(
        features,
        lambda rows: frechet_distance_of_rows(rows, reference.gaussian),
        seed=seed,
        resamples=options.resamples,
    )
    found = {"fid": replace(fid, low=max(0.0, fid.low))}
    if reference.features is not None and reference.radii is not None:
        kernels = reference.kernels()
        kernels.update(features)
        rows = torch.arange(len(features))
        found["kid"] = bootstrap(rows, kernels.finish().distance, seed=seed, resamples=options.resamples)
        found["precision"] = share(covered(features, reference.features, reference.radii))
        found["recall"] = share(covered(reference.features, features, radii(features)))
    return {name: replace(metric, basis=reference.basis) for name, metric in found.items()}
