"""The dual-modal image statistics: uniformity and total variation of images (published: DIFFDEFEND, Elijah)."""

from __future__ import annotations

import torch
from torch import Tensor


def uniformity(images: Tensor, trim: float = 0.25) -> float:
    """Return the trimmed mean of pairwise root-mean-square distances of images [N, C, H, W] in [0, 1].

    Low means that all images are alike; identical images give 0. As in Elijah, each row of the distance matrix loses
    its lowest and highest quarter before averaging, and so do the row means; the distance is pixel-wise where Elijah
    uses LPIPS, whose weights would be a download.
    """
    rows = images.flatten(1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
    others = distances[~torch.eye(len(rows), dtype=torch.bool)].view(len(rows), -1)
    return _trimmed(_trimmed(others, trim), trim).item()


def total_variation(images: Tensor) -> float:
    """Return the mean absolute difference of neighbouring pixels over images [N, C, H, W] in [0, 1].

    Per difference, so that it transfers across sizes; a constant image gives 0.
    """
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    right = (images[..., :, 1:] - images[..., :, :-1]).abs()
    return ((down.sum() + right.sum()) / (down.numel() + right.numel())).item()


def _trimmed(values: Tensor, trim: float) -> Tensor:
    """Return the mean over the last dimension without the lowest and the highest share `trim`."""
    count = values.shape[-1]
    cut = int(count * trim)
    return values.sort(dim=-1).values[..., cut : count - cut].mean(dim=-1)
