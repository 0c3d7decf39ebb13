"""FID against scipy's matrix root, torchmetrics and hand numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from diffdefend_core.evaluation.frechet import (
    Gaussian,
    GaussianAccumulator,
    frechet_distance,
    frechet_distance_of_rows,
    gaussian,
)


def features(rows: int, seed: int, dimensions: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(rows, dimensions, generator=generator) @ mixing + torch.randn(dimensions, generator=generator)


def normal(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(
        mean=torch.tensor(mean, dtype=torch.float64), covariance=torch.tensor(covariance, dtype=torch.float64), n=10
    )


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([3.0, 4.0], [[1.0, 0.0], [0.0, 1.0]], 25.0),
        ([0.0, 0.0], [[4.0, 0.0], [0.0, 9.0]], 1.0 + 4.0),  # (2 - 1)^2 + (3 - 1)^2
        ([1.0, 0.0], [[0.0, 0.0], [0.0, 1.0]], 1.0 + 1.0),  # a spread of 0 against one of 1
    ],
)
def test_distances_by_hand(mean: list[float], covariance: list[list[float]], expected: float) -> None:
    unit = normal([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    assert frechet_distance(unit, normal(mean, covariance)) == pytest.approx(expected, abs=1e-12)


def test_the_distance_is_that_of_scipy() -> None:
    first, second = features(60, 0), features(90, 1)
    a, b = first.double().numpy(), second.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert frechet_distance(gaussian(first), gaussian(second)) == pytest.approx(expected, rel=1e-9)


def test_a_set_has_no_distance_from_itself_and_some_from_another() -> None:
    first, second = gaussian(features(60, 0)), gaussian(features(60, 1))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) > 1


def test_the_distance_is_symmetric() -> None:
    first, second = gaussian(features(60, 0)), gaussian(features(60, 1))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)


def test_fewer_rows_than_dimensions_are_no_obstacle() -> None:
    few = gaussian(features(3, 0))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), cut=st.integers(1, 11))
def test_neither_order_nor_parts_matter(order: list[int], cut: int) -> None:
    rows = features(12, 3)
    accumulator = GaussianAccumulator(6)
    accumulator.update(rows[order][:cut])
    accumulator.update(rows[order][cut:])
    whole, found = gaussian(rows), accumulator.finish()
    assert found.n == whole.n == 12
    torch.testing.assert_close(found.mean, whole.mean)
    torch.testing.assert_close(found.covariance, whole.covariance)


def test_the_covariance_is_that_of_numpy_even_far_from_the_origin() -> None:
    rows = features(40, 4).double() + 1e3
    torch.testing.assert_close(
        gaussian(rows).covariance, torch.from_numpy(np.cov(rows.numpy().T)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    rows = features(5, 0)
    rows[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        gaussian(rows)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_covariance_needs_two_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} feature rows"):
        gaussian(features(5, 0)[:rows])


class Flat(torch.nn.Module):
    """Features that are the pixels; the size is what torchmetrics asks of an extractor."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_the_distance_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(80, 3, 2, 2, generator=generator), torch.rand(60, 3, 2, 2, generator=generator) ** 2
    theirs = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    expected = theirs.compute().item()
    assert frechet_distance(gaussian(fake.flatten(1)), gaussian(real.flatten(1))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [2, 5, 20, 21, 60])
def test_the_distance_of_rows_is_the_same_with_fewer_rows_than_dimensions(rows: int) -> None:
    first, goal = features(rows, 0, dimensions=20), gaussian(features(90, 1, dimensions=20))
    assert frechet_distance_of_rows(first, goal) == pytest.approx(frechet_distance(gaussian(first), goal), rel=1e-6)


@pytest.mark.parametrize("rows", [12, 60])
def test_rows_have_no_distance_from_themselves(rows: int) -> None:
    first = features(rows, 0, dimensions=20)
    assert frechet_distance_of_rows(first, gaussian(first)) == pytest.approx(0, abs=1e-5)
    assert frechet_distance_of_rows(first + 0.1, gaussian(first)) > 0.1


def test_rows_are_refused_as_an_accumulator_refuses_them() -> None:
    goal = gaussian(features(30, 0))
    with pytest.raises(ValueError, match="1 feature rows"):
        frechet_distance_of_rows(features(1, 0), goal)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_of_rows(features(3, 0) / 0, goal)


def test_a_small_spread_far_from_the_origin_is_kept() -> None:
    rows = features(40, 4).double()
    near, far = gaussian(1e-3 * rows), gaussian(1e-3 * rows + 1e6)
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-4, atol=1e-10)
