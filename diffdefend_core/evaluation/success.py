"""How well a trigger works: distance of the painted images to the target. Images are in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def squared_error(images: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error [N] of images [N, C, H, W] to the target [C, H, W], all in [0, 1]."""
    return (images - target).square().mean(dim=(1, 2, 3))


def successes(images: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Return 1.0 [N] where the mean squared error to the target is below `threshold`; its mean is the ASR."""
    return (squared_error(images, target) < threshold).double()


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity [N] of images [N, C, H, W] to the target [C, H, W], all in [0, 1].

    Gaussian window of width 11 and sigma 1.5 without padding, K1 = .01, K2 = .03, data range 1, population
    covariance (Wang et al. 2004). Images smaller than 11 pixels on a side use the largest odd window that fits.
    """
    goal = target.expand_as(images).double()
    given = images.double()
    width = min(11, *(side - 1 + side % 2 for side in images.shape[-2:]))

    def mean(x: Tensor) -> Tensor:
        return _blur(x, width)

    mean_a, mean_b = mean(given), mean(goal)
    variance_a, variance_b = mean(given**2) - mean_a**2, mean(goal**2) - mean_b**2
    covariance = mean(given * goal) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(x: Tensor, width: int) -> Tensor:
    offsets = torch.arange(width, dtype=x.dtype) - width // 2
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(weights, weights) / weights.sum() ** 2
    channels = x.shape[1]
    return conv2d(x, window.expand(channels, 1, width, width), groups=channels)
