"""Evaluation: FID, KID, ASR, MSE and SSIM, each with n and an interval, on the same seeds before and after."""

from diffdefend_core.evaluation.features import Extractor, extractor
from diffdefend_core.evaluation.score import Backdoor, medoid, plain_images, quality, success, triggered_images

__all__ = ["Backdoor", "Extractor", "extractor", "medoid", "plain_images", "quality", "success", "triggered_images"]
