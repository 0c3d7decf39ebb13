"""Precision and recall of generated images by nearest neighbours in feature space (Kynkaanniemi et al. 2019).

A set is taken as the union of balls around its rows, each as large as the distance to the k-th nearest other row.
Precision is the share of generated rows within the reference set, recall the share of reference rows within the
generated one: pictures that look right, and pictures that are not left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 3
BLOCK = 1024


def radii(rows: Tensor, k: int = K) -> Tensor:
    """Return the distance [N] of each row of [N, D] to its k-th nearest other row.

    Raises ValueError with fewer than k + 1 rows, or if they are not finite.
    """
    given = rows.double()
    if len(given) <= k:
        raise ValueError(f"{len(given)} feature rows; precision and recall need at least {k + 1}")
    if not torch.isfinite(given).all():
        raise ValueError("features are not finite")
    # the nearest of all is the row itself
    return torch.cat([_distances(part, given).kthvalue(k + 1, dim=1).values for part in torch.split(given, BLOCK)])


def covered(rows: Tensor, others: Tensor, radius: Tensor) -> Tensor:
    """Return 1.0 [N] where a row of [N, D] lies within the radius [M] of one of the `others` [M, D]."""
    parts = torch.split(rows.double(), BLOCK)
    return torch.cat([(_distances(part, others.double()) <= radius).any(1) for part in parts]).double()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the fast mode takes a difference of squares, after which a row has a distance from itself
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
