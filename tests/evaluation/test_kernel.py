"""KID against a plain double loop and torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

import diffdefend_core.evaluation.kernel as kernel
from diffdefend_core.evaluation.kernel import KernelAccumulator, kernel_distance


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


class Flat(torch.nn.Module):
    """Features that are the pixels; the sizes are what torchmetrics asks of an extractor."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_the_distance_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(40, 3, 2, 2, generator=generator), torch.rand(40, 3, 2, 2, generator=generator) ** 2
    theirs = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=40, normalize=False)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    expected, _ = theirs.compute()
    assert kernel_distance(fake.flatten(1), real.flatten(1)) == pytest.approx(expected.item(), rel=1e-4)


def test_neither_order_nor_batches_nor_blocks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(11, 0), features(13, 1, shift=0.5)
    whole = kernel_distance(first, second)
    monkeypatch.setattr(kernel, "BLOCK", 3)
    accumulator = KernelAccumulator(second.flip(0))
    for part in torch.split(first[torch.randperm(11, generator=torch.Generator().manual_seed(2))], 4):
        accumulator.update(part)
    assert accumulator.finish().distance(torch.arange(11)) == pytest.approx(whole, rel=1e-12)


def test_the_distance_of_some_rows_is_that_of_those_rows() -> None:
    first, second = features(9, 0), features(7, 1, shift=0.5)
    accumulator = KernelAccumulator(second)
    accumulator.update(first)
    rows = torch.tensor([1, 1, 4, 8, 0])
    assert accumulator.finish().distance(rows) == pytest.approx(kernel_distance(first[rows], second), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    rows = features(5, 0)
    rows[1, 2] = bad
    for first, second in ((rows, features(5, 1)), (features(5, 1), rows)):
        with pytest.raises(ValueError, match="not finite"):
            kernel_distance(first, second)
