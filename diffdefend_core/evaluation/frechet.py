"""Frechet distance between two sets of features: accumulate, finish, compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and unbiased covariance [D, D] of n feature rows, float64."""

    mean: Tensor
    covariance: Tensor
    n: int


class GaussianAccumulator:
    """Accumulates sums of features in float64; `finish` returns their Gaussian."""

    def __init__(self, dimensions: int) -> None:
        self.n = 0
        self._sum = torch.zeros(dimensions, dtype=torch.float64)
        self._outer = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]. Raises ValueError if they are not finite."""
        rows = features.double()
        if not torch.isfinite(rows).all():
            raise ValueError("features are not finite")
        self.n += len(rows)
        self._sum += rows.sum(0)
        self._outer += rows.T @ rows

    def finish(self) -> Gaussian:
        """Return the Gaussian. Raises ValueError with fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"{self.n} feature rows; a covariance needs at least 2")
        mean = self._sum / self.n
        covariance = (self._outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Gaussian(mean=mean, covariance=covariance, n=self.n)


def gaussian(features: Tensor) -> Gaussian:
    """Return the Gaussian of features [N, D]."""
    accumulator = GaussianAccumulator(features.shape[1])
    accumulator.update(features)
    return accumulator.finish()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017), at least 0.

    The trace of the root is taken from the symmetric C1^(1/2) C2 C1^(1/2), whose eigenvalues are those of C1 C2.
    """
    root = _matrix_root(first.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0)
    shift = (first.mean - second.mean).square().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float(shift + spread))


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
