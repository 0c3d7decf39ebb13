"""Evaluation: quality and attack success, each number with n and an interval, on the same seeds before and after."""

from diffdefend_core.evaluation.features import Extractor, extractor
from diffdefend_core.evaluation.perceptual import Perceptual, perceptual
from diffdefend_core.evaluation.quality import check_counts, quality
from diffdefend_core.evaluation.reference import Reference, from_features, from_images, from_npz
from diffdefend_core.evaluation.score import (
    Backdoor,
    medoid,
    plain_images,
    success,
    success_curve,
    triggered_images,
)

__all__ = [
    "Backdoor", "Extractor", "Perceptual", "Reference", "check_counts", "extractor", "from_features", "from_images",
    "from_npz", "medoid", "perceptual", "plain_images", "quality", "success", "success_curve", "triggered_images",
]  # fmt: skip
