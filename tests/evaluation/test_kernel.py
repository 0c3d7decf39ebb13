"""KID against a plain double loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffdefend_core.evaluation.kernel import kernel_distance


def features(rows: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)) + shift


def by_loops(a: list[list[float]], b: list[list[float]]) -> float:
    def kernel(x: list[float], y: list[float]) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    return sum(within_a) / len(within_a) + sum(within_b) / len(within_b) - 2 * sum(across) / len(across)


def test_the_distance_is_that_of_the_double_loop() -> None:
    first, second = features(7, 0), features(9, 1, shift=0.5)
    expected = by_loops(first.double().tolist(), second.double().tolist())
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_the_distance_by_hand() -> None:
    # k = 1 within the zeros and across, 8 within the ones: 1 + 8 - 2
    assert kernel_distance(torch.zeros(3, 2), torch.ones(2, 2)) == pytest.approx(7)


def test_it_is_unbiased() -> None:
    alike = [kernel_distance(features(20, 2 * seed), features(20, 2 * seed + 1)) for seed in range(60)]
    apart = [kernel_distance(features(20, 2 * seed), features(20, 2 * seed + 1, shift=1.0)) for seed in range(60)]
    mean = sum(alike) / 60
    error = (sum((value - mean) ** 2 for value in alike) / 59 / 60) ** 0.5
    assert abs(mean) < 3 * error
    assert min(alike) < 0 < min(apart)


@pytest.mark.parametrize(("rows", "others"), [(1, 5), (5, 1), (0, 5)])
def test_it_needs_two_rows_on_each_side(rows: int, others: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} and {others} feature rows"):
        kernel_distance(features(rows, 0), features(others, 1))
