"""Arrays to PNG: sample grids and triggers. Small images are enlarged by whole factors, so that pixels stay pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.report.bundle import Array

Pixels = NDArray[np.uint8]

BACKGROUND = 255


def grid_png(images: Array, *, columns: int, tile: int = 72, limit: int | None = None, gap: int = 2) -> bytes:
    """Return the first `limit` of images [N, C, H, W] in [0, 1] as a PNG grid, each about `tile` pixels high.

    What is outside [0, 1] is clamped, what is not finite is black; C = 1 is grey, C = 3 is RGB, any other number of
    channels shows each channel in grey, side by side. Raises ValueError if there is no image.
    """
    shown = np.asarray(images)[:limit]
    if shown.ndim != 4 or not shown.size:
        raise ValueError(f"images have the shape {shown.shape}; expected [N, C, H, W] with N of at least 1")
    return _png(_tiled([_sized(_pixels(image), tile) for image in shown], columns, gap))


def trigger_png(tau: Array, *, tile: int = 216) -> bytes:
    """Return a trigger [C, H, W] as PNG: mid-grey leaves a pixel as it is, white and black are +-max|tau|."""
    finite = np.nan_to_num(np.asarray(tau, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(np.abs(finite).max(initial=0.0)) or 1.0
    return _png(_sized(_pixels(0.5 + 0.5 * finite / peak), tile))


def _pixels(image: Array) -> Pixels:
    """Return [C, H, W] in [0, 1] as [H, W', 3]."""
    clean = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    levels = np.rint(np.clip(clean, 0.0, 1.0) * 255).astype(np.uint8)
    if levels.shape[0] == 3:
        return np.moveaxis(levels, 0, -1)
    grey: Pixels = np.concatenate(list(levels), axis=1)
    rgb: Pixels = np.stack([grey, grey, grey], axis=-1)
    return rgb


def _sized(pixels: Pixels, tile: int) -> Pixels:
    """Enlarge by the whole factor nearest to `tile`, or reduce by the mean over whole blocks."""
    height = pixels.shape[0]
    if height <= tile:
        factor = max(1, round(tile / height))
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    block = max(1, height // tile)
    rows, width = height // block * block, pixels.shape[1] // block * block
    blocks = pixels[:rows, :width].reshape(rows // block, block, width // block, block, 3)
    reduced: Pixels = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return reduced


def _tiled(tiles: list[Pixels], columns: int, gap: int) -> Pixels:
    height, width, _ = tiles[0].shape
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, BACKGROUND, dtype=np.uint8)
    for index, pixels in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels
    return sheet


def _png(pixels: Pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
