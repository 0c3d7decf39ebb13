"""Kernel distance between two sets of features (Binkowski et al. 2018)."""

from __future__ import annotations

from torch import Tensor


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared MMD of features [N, D] and [M, D] under k(a, b) = (a.b / D + 1)^3.

    It may be slightly negative. Raises ValueError with fewer than two rows on a side.
    """
    a, b = first.double(), second.double()
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} feature rows; the kernel distance needs at least 2 of each")
    within_a = (_kernel(a, a).sum() - _kernel(a, a).diagonal().sum()) / (n * (n - 1))
    within_b = (_kernel(b, b).sum() - _kernel(b, b).diagonal().sum()) / (m * (m - 1))
    return (within_a + within_b - 2 * _kernel(a, b).mean()).item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
