"""Randomness that does not depend on the batch size: one generator per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


def generators(seed: int, count: int, start: int = 0) -> list[torch.Generator]:
    """Return one CPU generator per sample, for the samples start .. start + count - 1 of stream `seed`."""
    return [torch.Generator().manual_seed((seed << 32) + index) for index in range(start, start + count)]


def standard_normal(streams: Generators, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return N(0, I) noise [len(streams), *shape], each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
