"""Reference statistics: from features, from a mean and covariance, or from pictures. What is read here is untrusted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdefend_core.errors import InputError, numpy_reason
from diffdefend_core.evaluation.features import PROVIDED, Extractor
from diffdefend_core.evaluation.frechet import Gaussian, GaussianAccumulator
from diffdefend_core.evaluation.kernel import KernelAccumulator
from diffdefend_core.evaluation.neighbours import K, radii

MAX_NPZ_BYTES = 4 << 30
BATCH = 128
FORMATS = ("PNG", "JPEG")


@dataclass(frozen=True)
class Reference:
    """What images are compared with: a Gaussian of features, and the features [M, D] themselves if they are there.

    With `features` come the kernel's sums and the radii [M] of its rows, which KID, precision and recall need. `name`
    says where it comes from, `basis` with which extractor it was made: distances of different bases do not compare.
    """

    gaussian: Gaussian
    name: str
    basis: str
    features: Tensor | None = None
    radii: Tensor | None = None

    def kernels(self) -> KernelAccumulator:
        """Return an accumulator of the kernel distance to the features. Raises ValueError if there are none."""
        if self.features is None:
            raise ValueError("the reference holds no features")
        return KernelAccumulator(self.features)


def from_features(parts: Iterable[Tensor], chosen: Extractor, name: str) -> Reference:
    """Return the reference of features [m, D] that come in parts. Raises InputError if there are too few rows."""
    accumulator = GaussianAccumulator(chosen.dimensions)
    rows: list[Tensor] = []
    for part in parts:
        accumulator.update(part)
        rows.append(part.double())
    if accumulator.n <= K:
        raise InputError(
            f"reference {name} with {accumulator.n} images",
            expected=f"at least {K + 1}, and for a useful FID many more than its {chosen.dimensions} dimensions",
            action="give more images",
        )
    features = torch.cat(rows)
    return _named(accumulator.finish(), chosen, name, features, radii(features))


def from_npz(content: bytes, chosen: Extractor, name: str) -> Reference:
    """Return the reference of an npz file: `features` [M, D] and `extractor`, or `mu` [D] and `sigma` [D, D].

    `extractor_sha256` is compared if it is there. Statistics that name no extractor are taken as the usual ones, of
    Inception. Raises InputError for a file that cannot be read, of another extractor, shape or size, or not finite.
    """
    arrays = _arrays(content, name)
    _check_extractor(arrays, chosen, name)
    if "features" in arrays:
        features = _numbers(arrays["features"], 2, chosen, name, "features")
        return from_features([torch.from_numpy(features)], chosen, name)
    mean = torch.from_numpy(_numbers(arrays["mu"], 1, chosen, name, "mu"))
    covariance = torch.from_numpy(_numbers(arrays["sigma"], 2, chosen, name, "sigma"))
    scale = covariance.diagonal().abs().max().clamp(min=1e-12)
    if len(covariance) != len(mean) or (covariance - covariance.T).abs().max() > 1e-6 * scale:
        raise _wrong(name, f"`sigma` {tuple(covariance.shape)} is no covariance of {len(mean)} features")
    if covariance.diagonal().min() < -1e-6 * scale:
        raise _wrong(name, "`sigma` has negative variances")
    return _named(Gaussian(mean=mean, covariance=covariance, n=0), chosen, name)


def from_images(
    contents: Callable[[], Iterable[tuple[str, bytes]]], shape: tuple[int, int, int], chosen: Extractor, name: str
) -> Reference:
    """Return the reference of PNG and JPEG files, given as (file name, content), of pictures of `shape` (C, H, W).

    Raises InputError for a file that is no picture, or one of another size.
    """
    return from_features(_in_batches(contents(), shape, chosen), chosen, name)


def read_image(content: bytes, shape: tuple[int, int, int], name: str) -> Tensor:
    """Return one PNG or JPEG as [C, H, W] in [0, 1]; the size is compared before a pixel is decoded.

    Raises InputError for a file that is no picture, or one of another size.
    """
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            if picture.size != (width, height):
                raise _other_size(name, picture.size, shape)
            pixels = np.asarray(picture.convert({1: "L", 3: "RGB"}[channels]), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"reference image {name} cannot be read ({' '.join(str(error).split())[:100]})",
            expected="PNG and JPEG files",
            action="remove or replace it",
        ) from error
    except KeyError as error:
        raise InputError(
            f"a folder of images as reference of a model of {channels} channels",
            expected="a model that paints grey or RGB pictures",
            action="give the reference as features (npz) or as a model",
        ) from error
    return torch.from_numpy(pixels.reshape(height, width, channels).copy()).permute(2, 0, 1).float() / 255


def basis(chosen: Extractor, reference: str) -> str:
    """Return what a distance was measured with, as `Metric.basis` holds it."""
    return f"{chosen.name} {chosen.sha256[:16]} against {reference}"


def _named(
    gaussian: Gaussian, chosen: Extractor, name: str, features: Tensor | None = None, widths: Tensor | None = None
) -> Reference:
    return Reference(gaussian=gaussian, name=name, basis=basis(chosen, name), features=features, radii=widths)


def _in_batches(
    contents: Iterable[tuple[str, bytes]], shape: tuple[int, int, int], chosen: Extractor
) -> Iterable[Tensor]:
    images: list[Tensor] = []
    for name, content in contents:
        images.append(read_image(content, shape, name))
        if len(images) == BATCH:
            yield chosen.features(torch.stack(images))
            images = []
    if images:
        yield chosen.features(torch.stack(images))


def _arrays(content: bytes, name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays that are needed. Pickles are never loaded, and no small file becomes a large one."""
    wanted = ("features", "mu", "sigma", "extractor", "extractor_sha256")
    try:
        with ZipFile(io.BytesIO(content)) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MAX_NPZ_BYTES:
            raise _wrong(name, f"it unpacks to {size} bytes, more than {MAX_NPZ_BYTES}")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in wanted if key in file}
    except InputError:
        raise
    except (ValueError, KeyError, OSError, EOFError, BadZipFile, AttributeError, TypeError, MemoryError) as error:
        raise _wrong(name, numpy_reason(error)) from error
    if not ("features" in arrays and "extractor" in arrays) and not ("mu" in arrays and "sigma" in arrays):
        raise _wrong(name, f"it holds {', '.join(arrays) or 'none of the names'}")
    return arrays


def _check_extractor(arrays: dict[str, NDArray[Any]], chosen: Extractor, name: str) -> None:
    made_by = str(arrays["extractor"]) if "extractor" in arrays else next(iter(PROVIDED))
    if made_by != chosen.name:
        remark = "" if "extractor" in arrays else " (it names none, as the usual statistics do)"
        raise InputError(
            f"reference features of extractor {made_by}{remark}",
            expected=f"those of {chosen.name}",
            action="never compare across extractors: make the reference anew",
        )
    digest = str(arrays.get("extractor_sha256", chosen.sha256))
    if digest != chosen.sha256:
        raise InputError(
            f"reference {name} of extractor {made_by} with sha256 {digest[:64]}",
            expected=f"sha256 {chosen.sha256}",
            action="never compare across extractors: make the reference anew",
        )


def _numbers(array: NDArray[Any], axes: int, chosen: Extractor, name: str, what: str) -> NDArray[np.float64]:
    """Return an array of finite numbers with the extractor's number of features on its last axis, in float64."""
    if array.dtype.kind not in "fiu":
        raise _wrong(name, f"`{what}` is of type {array.dtype}")
    if array.ndim != axes or array.shape[-1] != chosen.dimensions:
        width = f"[{'M, ' if what == 'features' else ''}{chosen.dimensions}]"
        wanted = width if what != "sigma" else f"[{chosen.dimensions}, {chosen.dimensions}]"
        raise _wrong(name, f"`{what}` has the shape {array.shape}, not {wanted}")
    if not np.isfinite(array).all():
        raise _wrong(name, f"`{what}` holds numbers that are not finite")
    return array.astype(np.float64)


def _wrong(name: str, reason: str) -> InputError:
    return InputError(
        f"reference {name} cannot be read ({reason})",
        expected="an npz file with `features` [M, D] and `extractor`, or with `mu` [D] and `sigma` [D, D]",
        action="make it with the extractor that the scan uses",
    )


def _other_size(name: str, size: tuple[int, int], shape: tuple[int, int, int]) -> InputError:
    return InputError(
        f"reference image {name} of {size[0]} x {size[1]} pixels",
        expected=f"{shape[2]} x {shape[1]}, as the model paints them",
        action="resize the images of the reference, all in the same way",
    )
