"""Randomness that does not depend on the batch size: one generator per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]
SPACING = 2654435769


def generators(seed: int, count: int, start: int = 0) -> list[torch.Generator]:
    """Return one CPU generator per sample, for the samples start .. start + count - 1 of stream `seed`.

    A CPU generator looks at 32 bits of its seed. Multiples of 2^32 / golden ratio are far apart modulo 2^32, so that
    the first 50 000 samples of streams whose seeds differ by less than 60 000 are all different.
    """
    first = seed * SPACING + start
    return [torch.Generator().manual_seed((first + number) % 2**32) for number in range(count)]


def standard_normal(streams: Generators, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return N(0, I) noise [len(streams), *shape], each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
