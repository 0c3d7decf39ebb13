"""Intervals: Wilson's against its equation and scipy, the bootstrap's by its coverage."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from diffdefend_core.evaluation.interval import bootstrap, share


def outcomes(successes: int, n: int) -> torch.Tensor:
    return (torch.arange(n) < successes).double()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (7, 20), (64, 64), (3, 256)])
def test_the_share_has_wilsons_interval(successes: int, n: int) -> None:
    found = share(outcomes(successes, n))
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (found.value, found.n) == (pytest.approx(successes / n), n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_its_ends_solve_wilsons_equation() -> None:
    found, z = share(outcomes(7, 20)), 1.959964
    for p in (found.low, found.high):
        assert (0.35 - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / 20, rel=1e-9)


def test_no_success_is_no_certainty() -> None:
    assert (share(outcomes(0, 10)).low, share(outcomes(0, 10)).high) == pytest.approx((0, 0.2775), abs=1e-4)
    assert share(outcomes(0, 1000)).high < 0.004


def mean(rows: torch.Tensor) -> float:
    return rows.mean().item()


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.86, 1.0), (0.5, 0.35, 0.65)])
def test_the_bootstrap_covers_the_truth_as_often_as_it_says(level: float, least: float, most: float) -> None:
    covered = 0
    for seed in range(100):
        rows = torch.randn(60, generator=torch.Generator().manual_seed(seed)) + 2
        found = bootstrap(rows, mean, seed=seed, resamples=100, level=level)
        covered += found.low <= 2 <= found.high
    assert least <= covered / 100 <= most


def test_the_bootstrap_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    rows = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = bootstrap(rows, mean, seed=0, resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * rows.std().item() / 20, rel=0.1)
    assert found.low < found.value < found.high and found.n == 400


def test_the_bootstrap_is_reproducible_by_its_seed() -> None:
    rows = torch.randn(30, generator=torch.Generator().manual_seed(0))
    first, again, other = (bootstrap(rows, mean, seed=seed, resamples=20) for seed in (1, 1, 2))
    assert first == again != other


def test_constant_rows_leave_no_doubt() -> None:
    found = bootstrap(torch.full((8,), 0.25), mean, seed=0, resamples=10)
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)
