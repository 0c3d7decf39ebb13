"""Kernel distance between two sets of features (Binkowski et al. 2018): accumulate, finish, compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# rows of a block: bounds the memory of a sum over all pairs
BLOCK = 1024


class KernelAccumulator:
    """Collects features in float64 and finishes with their distance to a reference [M, D].

    The sums run over pairs of rows, so the rows are kept: batches change nothing, and neither does their order. The sum
    within the reference is taken once. Raises ValueError if features are not finite.
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = _finite(reference)
        self._within = _mean_of_pairs(self.reference) if len(reference) > 1 else None
        self._parts: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add features [N, D]."""
        self._parts.append(_finite(features))

    def finish(self) -> Kernels:
        """Return the kernels of all rows. Raises ValueError with fewer than two rows on a side."""
        rows = torch.cat(self._parts) if self._parts else self.reference[:0]
        if self._within is None or len(rows) < 2:
            raise ValueError(
                f"{len(rows)} and {len(self.reference)} feature rows; the kernel distance needs at least 2 of each"
            )
        across = torch.cat([_kernel(part, self.reference).mean(1) for part in torch.split(rows, BLOCK)])
        return Kernels(own=_kernel(rows, rows), across=across, within=self._within)


@dataclass(frozen=True)
class Kernels:
    """What the distance needs of a set: kernels `own` [N, N], means `across` [N] to the reference, `within` it."""

    own: Tensor
    across: Tensor
    within: float

    def distance(self, rows: Tensor) -> float:
        """Return the unbiased squared MMD of the rows with these indices [K]; it may be slightly negative."""
        own, n = self.own[rows][:, rows], len(rows)
        return float((own.sum() - own.diagonal().sum()) / (n * (n - 1)) + self.within - 2 * self.across[rows].mean())


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared MMD of features [N, D] and [M, D] under k(a, b) = (a.b / D + 1)^3.

    It may be slightly negative. Raises ValueError with fewer than two rows on a side.
    """
    accumulator = KernelAccumulator(second)
    accumulator.update(first)
    return accumulator.finish().distance(torch.arange(len(first)))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_of_pairs(rows: Tensor) -> float:
    """Return the mean kernel over all pairs of different rows."""
    total = sum(float(_kernel(part, rows).sum()) for part in torch.split(rows, BLOCK))
    alone = float(((rows.square().sum(1) / rows.shape[1] + 1) ** 3).sum())
    return (total - alone) / (len(rows) * (len(rows) - 1))


def _finite(features: Tensor) -> Tensor:
    rows = features.double()
    if not torch.isfinite(rows).all():
        raise ValueError("features are not finite")
    return rows
