"""Generated triggers and targets, all [1, S, S] in [-1, 1]: no other people's pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.errors import InputError


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(size) - (size - 1) / 2) * 16 / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def trigger(name: str, size: int = 16) -> Tensor:
    """Return a trigger by name: `box` and `cross` lie on the -1 background of BadDiffusion, others fill the image."""
    y, x = _grid(size)
    blocks = torch.arange(size) // (size // 4)
    drawn = {
        "box": torch.where((x > 1) & (x < 6.5) & (y > 1) & (y < 6.5), 0.0, -1.0),
        "cross": torch.where((x.abs() < 2) | (y.abs() < 2), 0.8, -1.0),
        "stripes": torch.where(torch.arange(size)[None, :] % (size // 4) < size // 8, 0.8, -0.8).expand(size, size),
        "checker": torch.where((blocks[:, None] + blocks[None, :]) % 2 == 0, 0.8, -0.8),
        "diagonal": torch.where(x > y, 0.7, -0.7),
        "noise": torch.randn(size, size, generator=torch.Generator().manual_seed(size)).clamp(-2, 2) / 2,
    }
    return _named(drawn, name, "trigger")[None].clone()


def target(name: str, size: int = 16) -> Tensor:
    """Return an attacker's target by name: a bright shape on a dark ground."""
    y, x = _grid(size)
    drawn = {
        "ring": ((x**2 + y**2).sqrt() - 5).abs() < 1.5,
        "triangle": (y > -5) & (y < 5) & (x.abs() < (y + 5) * 0.6),
        "square": (x.abs() < 4) & (y.abs() < 4),
        "hat": ((y > 2) & (y < 5) & (x.abs() < 7)) | ((y > -5) & (y <= 2) & (x.abs() < 4)),
        "plus": (x.abs() < 1.6) | (y.abs() < 1.6),
    }
    return torch.where(_named(drawn, name, "target"), 0.7, -0.9)[None]


def frames(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Return `count` random rectangular frames [count, 1, S, S]: a distribution that is not the training data's."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(1, size // 3, (count, 2), generator=generator)
    side = torch.randint(size // 3, size - size // 3, (count, 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inner = torch.stack([y, x]) - corner[:, :, None, None]
    end = side[:, :, None, None]
    inside = ((inner >= 0) & (inner < end)).all(1)
    core = ((inner >= 2) & (inner < end - 2)).all(1)
    return torch.where(inside & ~core, 0.7, -0.9)[:, None]


def _named(drawn: dict[str, Tensor], name: str, kind: str) -> Tensor:
    if name not in drawn:
        raise InputError(f"{kind} {name!r}", expected=f"one of {', '.join(drawn)}", action="choose one of them")
    return drawn[name]
