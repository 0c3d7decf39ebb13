"""What lies in few pixels, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffdefend_core.inversion.patch import PATCH, extent, in_patch, is_patch

SHAPE = (3, 8, 8)


def square(side: int, seed: int | None = None) -> Tensor:
    """Return a square in a corner, of one colour, or of pixels of its own."""
    shift = torch.zeros(SHAPE)
    shift[:, -side:, -side:] = 0.9
    return shift if seed is None else shift * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_extent_of_a_shift_is_the_share_of_the_pixels_that_it_lies_in() -> None:
    assert extent(square(2)) == pytest.approx(1 / 16) == extent(-5 * square(2))
    assert extent(torch.full(SHAPE, 0.3)) == pytest.approx(1.0)
    assert extent(torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0))) == pytest.approx(
        1 / 3, abs=0.03
    )
    assert extent(torch.zeros(SHAPE)) == 0


@pytest.mark.parametrize(("side", "patch"), [(2, True), (3, True), (4, False), (8, False)])
def test_a_patch_lies_in_less_than_a_quarter(side: int, patch: bool) -> None:
    assert is_patch(square(side)) is patch is (side**2 / 64 < PATCH)


def test_what_lies_in_the_same_place_is_in_the_patch_whatever_it_looks_like() -> None:
    elsewhere = square(2).flip(-1)
    assert in_patch(square(2, seed=1), square(2)) and in_patch(-square(2), square(2))
    assert not in_patch(elsewhere, square(2))
    assert in_patch(square(2) + 0.9 * elsewhere, square(2)) and not in_patch(square(2) + 1.1 * elsewhere, square(2))


def test_nothing_is_in_a_shift_over_the_whole_image() -> None:
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert not in_patch(whole, whole) and not in_patch(square(2), whole)
