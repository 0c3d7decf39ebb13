"""Percentile bootstrap intervals: every number is reported with what its samples allow to say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.artifacts import Metric


def bootstrap(
    rows: Tensor, statistic: Callable[[Tensor], float], *, seed: int, resamples: int = 200, level: float = 0.95
) -> Metric:
    """Return statistic(rows) for rows [N, ...] with its percentile bootstrap interval of confidence `level`.

    The interval is moved by the bootstrap's own estimate of its bias: drawing rows more than once lengthens distances
    such as FID and KID, so that the plain interval would not hold the value that it belongs to.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    draws = torch.tensor(
        [statistic(rows[torch.randint(n, (n,), generator=generator)]) for _ in range(resamples)], dtype=torch.float64
    )
    tail = (1 - level) / 2
    value = statistic(rows)
    unbiased = draws - draws.mean() + value
    low, high = torch.quantile(unbiased, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Metric(value=value, low=low, high=high, n=n)


def share(successes: Tensor, level_z: float = 1.959964) -> Metric:
    """Return the mean of 0/1 rows [N] with its Wilson interval, which does not collapse at 0 or 1."""
    n, p = len(successes), successes.double().mean().item()
    center = (p + level_z**2 / (2 * n)) / (1 + level_z**2 / n)
    half = level_z / (1 + level_z**2 / n) * (p * (1 - p) / n + level_z**2 / (4 * n**2)) ** 0.5
    return Metric(value=p, low=max(0.0, center - half), high=min(1.0, center + half), n=n)
