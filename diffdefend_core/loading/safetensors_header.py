"""A strict reader of safetensors headers, and a search for weights that are not finite. No torch.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without gaps or overlaps up to the end of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.json_file import parse_json_object

# 8 MiB describe about 60,000 tensors; the objects made of them take some fifty times that
MAX_HEADER = 8 << 20
MAX_RANK = 8
MAX_SIDE = 1 << 31
CHUNK = 8 << 20


@dataclass(frozen=True)
class Dtype:
    """How a dtype lies in the file, and which of its elements become finite float32 numbers."""

    layout: np.dtype[Any]
    finite: Callable[[NDArray[Any]], bool]


def _finite(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(values).all())


def _finite_bfloat16(bits: NDArray[Any]) -> bool:
    return bool(((bits & 0x7F80) != 0x7F80).all())


def _finite_as_float32(values: NDArray[Any]) -> bool:
    return bool((np.abs(values) <= np.finfo(np.float32).max).all())


DTYPES = {
    "F16": Dtype(np.dtype("<f2"), _finite),
    "BF16": Dtype(np.dtype("<u2"), _finite_bfloat16),
    "F32": Dtype(np.dtype("<f4"), _finite),
    "F64": Dtype(np.dtype("<f8"), _finite_as_float32),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of the file: dtype, shape, and the bytes [begin, end) counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises ModelRejectedError when the file is truncated, has bytes that no tensor owns, or breaks the format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise _rejected(path, f"is truncated ({size} bytes, header of {length})")
        if length > MAX_HEADER:
            raise _rejected(path, f"has a header of {length} bytes, more than {MAX_HEADER}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise _rejected(path, "does not begin with a safetensors header")
    entries = parse_json_object(text, f"the header of {path.name}")
    _check_metadata(path, entries.pop("__metadata__", {}))
    tensors = sorted((_tensor(path, name, entry, 8 + length) for name, entry in entries.items()), key=_place)
    _check_places(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def check_finite(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Read all weights in pieces of 8 MiB. Raises ModelRejectedError that names a tensor with NaN or Inf."""
    with path.open("rb") as file:
        for tensor in tensors.values():
            file.seek(tensor.begin)
            dtype, left = DTYPES[tensor.dtype], tensor.end - tensor.begin
            while left > 0:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    raise _rejected(path, "became shorter while it was read")
                left -= len(piece)
                if not dtype.finite(np.frombuffer(piece, dtype=dtype.layout)):
                    raise ModelRejectedError(
                        f"tensor {tensor.name} of {path.name} holds NaN, Inf or a number beyond float32",
                        expected="finite weights",
                        action="do not load this model; train or export it again",
                    )


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _rejected(path, f"describes tensor {name[:80]!r} by other keys than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _rejected(path, f"holds tensor {name[:80]!r} of dtype {str(dtype)[:20]}, not {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_RANK or not all(1 <= side < MAX_SIDE for side in shape):
        raise _rejected(path, f"holds tensor {name[:80]!r} of shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _rejected(path, f"holds tensor {name[:80]!r} at {str(offsets)[:80]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].layout.itemsize:
        raise _rejected(path, f"gives tensor {name[:80]!r} {end - begin} bytes, which is not its shape and dtype")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=base + begin, end=base + end)


def _check_places(path: Path, tensors: list[TensorInfo], base: int, size: int) -> None:
    if not tensors:
        raise _rejected(path, "holds no tensor")
    position = base
    for tensor in tensors:
        if tensor.begin != position:
            raise _rejected(path, f"leaves a gap or an overlap before tensor {tensor.name[:80]!r}")
        position = tensor.end
    if position != size:
        raise _rejected(path, f"has {size} bytes where its header promises {position}: truncated or padded")


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _rejected(path, "has metadata that is not text")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _rejected(path: Path, what: str) -> ModelRejectedError:
    return ModelRejectedError(
        f"{path.name} {what}", expected="a whole, well-formed safetensors file", action="download or export it again"
    )
