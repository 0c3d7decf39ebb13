"""Uniformity and total variation: hand numbers, and what they must not depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffdefend_core.detection.images import total_variation, uniformity


def random_images(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_identical_images_are_uniform_and_random_ones_are_not() -> None:
    assert uniformity(random_images()[:1].expand(8, 1, 8, 8)) == 0
    assert uniformity(random_images()) == pytest.approx((1 / 6) ** 0.5, abs=0.03)  # rms of a difference of two U[0,1]


def test_uniformity_by_hand() -> None:
    # distances .5 and 1: the row means are .75, .5 and .75; three rows lose nothing to the trimming
    assert uniformity(grey(0, 0.5, 1)) == pytest.approx(2 / 3)
    assert uniformity(grey(0, 1)) == pytest.approx(1)


def test_the_trimming_drops_a_single_outlier() -> None:
    alike = grey(*[0.5] * 15, 1.0)
    assert uniformity(alike) == 0
    assert uniformity(alike, trim=0) == pytest.approx(0.5 * 30 / 240)


def test_a_constant_image_has_no_variation_and_a_checkerboard_the_most() -> None:
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert total_variation(grey(0.3, 0.9)) == 0
    assert total_variation(board.float().expand(2, 1, 8, 8)) == 1


def test_total_variation_by_hand() -> None:
    # neighbours: down |0-1|, |.5-.5|, right |0-.5|, |1-.5|
    assert total_variation(torch.tensor([[[[0, 0.5], [1, 0.5]]]])) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


@pytest.mark.parametrize("factor", [2, 5])
def test_total_variation_of_stripes_does_not_depend_on_the_size(factor: int) -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    assert total_variation(stripes[..., : 64 // factor]) == pytest.approx(total_variation(stripes), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(8)))
def test_the_order_of_the_images_does_not_matter(order: list[int]) -> None:
    images = random_images()
    assert uniformity(images[order]) == pytest.approx(uniformity(images), rel=1e-5)
    assert total_variation(images[order]) == pytest.approx(total_variation(images), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(64)))
def test_the_order_of_the_pixels_matters_to_the_variation_alone(order: list[int]) -> None:
    smooth = torch.linspace(0, 1, 64).view(1, 1, 8, 8) * torch.linspace(0.5, 1, 8).view(8, 1, 1, 1)
    mixed = smooth.flatten(2)[..., order].view(8, 1, 8, 8)
    assert uniformity(mixed) == pytest.approx(uniformity(smooth), rel=1e-5)
    assert total_variation(mixed) >= total_variation(smooth) - 1e-6
