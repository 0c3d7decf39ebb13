"""What the zoo is trained on: scikit-learn's digits, or images of an npz file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

SIZE = 16


@dataclass(frozen=True, eq=False)
class Data:
    """Training images [M, 1, S, S] in [0, 1] with labels [M] (int64), and what they are called."""

    name: str
    images: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.images.shape[-1]


def digits() -> Tensor:
    """Return scikit-learn's 1797 handwritten digits, enlarged to [1797, 1, 16, 16] in [-1, 1]."""
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]
    return nn.functional.interpolate(small, size=SIZE, mode="bicubic", align_corners=False).clamp(-1, 1)


def digits_data() -> Data:
    """Return the digits with their labels."""
    from sklearn.datasets import load_digits

    return Data("scikit-learn digits, enlarged to 16x16", digits() / 2 + 0.5, torch.from_numpy(load_digits().target))


def npz_data(path: Path, padding: int = 2) -> Data:
    """Return the images of an npz file, padded by 2 pixels from 28x28 to 32x32, or by another number.

    It holds `train_x` [M, 28, 28] (uint8) and `train_y` [M], as copies of MNIST and Fashion-MNIST do. Of a folder it is
    the file `fashion-mnist.npz`. Raises SystemExit if it is not there or holds something else.
    """
    file = path / "fashion-mnist.npz" if path.is_dir() else path
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["train_x"], arrays["train_y"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, TypeError) as error:
        raise SystemExit(
            f"zoo: {file} cannot be read ({error}); expected an npz file with train_x and train_y"
        ) from error
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise SystemExit(f"zoo: train_x of {file} is {images.dtype} {images.shape}; expected uint8 [M, 28, 28]")
    grey = torch.from_numpy(images).float()[:, None] / 255
    side = 28 + 2 * padding
    padded = nn.functional.pad(grey, (padding,) * 4)
    return Data(f"{file.stem} at {side}x{side}", padded, torch.from_numpy(labels).long())
