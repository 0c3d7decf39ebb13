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
        # sums are taken from the first row: far from the origin, squares would swallow the spread
        self._origin = torch.zeros(dimensions, dtype=torch.float64)
        self._sum = torch.zeros(dimensions, dtype=torch.float64)
        self._outer = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]. Raises ValueError if they are not finite."""
        rows = features.double()
        _check_finite(rows)
        if not self.n and len(rows):
            self._origin = rows[0].clone()
        rows = rows - self._origin
        self.n += len(rows)
        self._sum += rows.sum(0)
        self._outer += rows.T @ rows

    def finish(self) -> Gaussian:
        """Return the Gaussian. Raises ValueError with fewer than two rows."""
        _check_count(self.n)
        shift = self._sum / self.n
        covariance = (self._outer - self.n * torch.outer(shift, shift)) / (self.n - 1)
        return Gaussian(mean=self._origin + shift, covariance=covariance, n=self.n)


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


def frechet_distance_of_rows(rows: Tensor, goal: Gaussian) -> float:
    """Return the Frechet distance of the Gaussian of `rows` [N, D] to another, the same number as `frechet_distance`.

    With fewer rows than dimensions C1 is X^T X / (N - 1) of the centred rows X, so that C1 C2 has the non-zero
    eigenvalues of X C2 X^T / (N - 1): N x N in place of D x D. Raises ValueError with fewer than two finite rows.
    """
    if len(rows) > rows.shape[1]:
        return frechet_distance(gaussian(rows), goal)
    _check_count(len(rows))
    _check_finite(rows)
    own = rows.double().mean(0)
    centred = rows.double() - own
    eigenvalues = torch.linalg.eigvalsh(centred @ goal.covariance @ centred.T / (len(rows) - 1)).clamp(min=0)
    shift = (own - goal.mean).square().sum()
    spread = centred.square().sum() / (len(rows) - 1) + goal.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float(shift + spread))


def _check_count(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"{rows} feature rows; a covariance needs at least 2")


def _check_finite(rows: Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise ValueError("features are not finite")


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
