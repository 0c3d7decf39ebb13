"""What the zoo learns: digits in [0, 1] with their labels, and images of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import SIZE, digits, digits_data, npz_data


def test_the_digits_fill_the_range_of_the_model() -> None:
    data = digits()
    assert data.shape == (1797, 1, SIZE, SIZE)
    assert data.min() == -1 and data.max() == 1


def test_the_digits_come_with_their_labels_in_the_unit_range() -> None:
    data = digits_data()
    assert data.size == SIZE and data.labels.dtype == torch.int64
    torch.testing.assert_close(data.images, digits() / 2 + 0.5)
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # a drawn 1 has less ink in its left third than a drawn 0
    zero, one = (data.images[data.labels == digit][..., : SIZE // 3].mean() for digit in (0, 1))
    assert one < zero


def test_images_of_a_file_are_padded_to_a_power_of_two(tmp_path: Path) -> None:
    images = np.zeros((3, 28, 28), dtype=np.uint8)
    images[1, 0, 0], images[2] = 255, 51
    np.savez(tmp_path / "clothes.npz", train_x=images, train_y=np.array([7, 0, 9], dtype=np.uint8))
    data = npz_data(tmp_path / "clothes.npz")
    assert data.images.shape == (3, 1, 32, 32) and data.size == 32 and "clothes" in data.name
    assert data.labels.tolist() == [7, 0, 9] and data.labels.dtype == torch.int64
    assert data.images[1, 0].nonzero().tolist() == [[2, 2]] and data.images.max() == 1
    assert data.images[2, 0, 2:-2, 2:-2].unique().tolist() == pytest.approx([0.2])
    assert not data.images[2, 0, :2].any()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no archive"], ids=["empty", "torn", "garbage"])
def test_a_file_that_is_none_ends_the_build_with_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^zoo: .*bad\.npz cannot be read"):
        npz_data(tmp_path / "bad.npz")


@pytest.mark.parametrize("images", [np.zeros((3, 32, 32), dtype=np.uint8), np.zeros((3, 28, 28))])
def test_images_of_another_kind_end_the_build_with_a_line(images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", train_x=images, train_y=np.zeros(3))
    with pytest.raises(SystemExit, match="expected uint8"):
        npz_data(tmp_path / "bad.npz")
    np.save(tmp_path / "bad.npy", images)
    with pytest.raises(SystemExit, match="cannot be read"):
        npz_data(tmp_path / "bad.npy")
