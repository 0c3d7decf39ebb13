"""Arrays become the pictures that they are: right levels, whole pixels, no surprise at odd shapes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffdefend_core.report.pictures import grid_png, trigger_png


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_levels_are_rounded_and_clamped() -> None:
    image = np.array([[[[0.0, 1.0], [0.5, 0.999]]], [[[-3.0, 7.0], [np.nan, np.inf]]]])
    sheet = pixels(grid_png(image, columns=2, tile=2, gap=0))
    assert sheet[..., 0].tolist() == [[0, 255, 0, 255], [128, 255, 0, 255]]


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    image = np.arange(4.0).reshape(1, 1, 2, 2) / 4
    sheet = pixels(grid_png(image, columns=1, tile=7))
    assert sheet.shape == (8, 8, 3)
    assert (sheet[:4, :4] == sheet[0, 0]).all()
    assert len(np.unique(sheet)) == 4


def test_large_images_are_reduced_by_their_mean() -> None:
    image = np.zeros((1, 3, 8, 8))
    image[:, :, ::2] = 1.0
    sheet = pixels(grid_png(image, columns=1, tile=4))
    assert sheet.shape == (4, 4, 3)
    assert set(np.unique(sheet)) <= {127, 128}


def test_the_grid_is_filled_row_by_row_and_padded_with_white() -> None:
    images = np.zeros((3, 1, 2, 2))
    images[1] = 0.2
    sheet = pixels(grid_png(images, columns=2, tile=2, gap=1))
    assert sheet.shape == (5, 5, 3)
    assert (sheet[0, 0, 0], sheet[0, 3, 0], sheet[3, 0, 0], sheet[4, 4, 0]) == (0, 51, 0, 255)


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (2, 8), (3, 4), (4, 16)])
def test_any_number_of_channels_shows(channels: int, width: int) -> None:
    assert pixels(grid_png(np.zeros((1, channels, 4, 4)), columns=1, tile=4)).shape == (4, width, 3)


def test_a_limit_shows_the_first_only() -> None:
    assert pixels(grid_png(np.zeros((9, 1, 2, 2)), columns=9, tile=2, gap=0, limit=3)).shape == (2, 6, 3)


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (1, 2, 2), (2, 2)])
def test_no_image_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        grid_png(np.zeros(shape), columns=1)


@given(st.floats(0.01, 1e6))
def test_a_trigger_is_grey_where_it_is_zero_whatever_its_scale(scale: float) -> None:
    tau = np.array([[[0.0, scale], [-scale, 0.0]]])
    assert pixels(trigger_png(tau, tile=2))[..., 0].tolist() == [[128, 255], [0, 128]]


def test_an_empty_or_broken_trigger_is_grey() -> None:
    for value in (0.0, np.nan):
        assert (pixels(trigger_png(np.full((1, 2, 2), value), tile=2)) == 128).all()
