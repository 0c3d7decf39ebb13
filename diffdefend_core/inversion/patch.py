"""Shifts that lie in few pixels. Ours (not published)."""

from __future__ import annotations

from torch import Tensor

# a shift in less than this share of the pixels is a patch
PATCH = 0.25
# another one is in it if so much of its energy is where the patch has this share of its own largest
INSIDE, EDGE = 0.5, 0.1


def extent(tau: Tensor) -> float:
    """Return the share of the pixels that a shift [C, H, W] lies in: 1 for a constant, 1 / 3 for white noise.

    It is the participation ratio (sum e)^2 / (n sum e^2) of the energies e, the squares, of the n pixels. Of a patch it
    is the share of the area.
    """
    energy = _energy(tau)
    return (energy.mean().square() / energy.square().mean().clamp(min=1e-20)).item()


def is_patch(tau: Tensor) -> bool:
    """Whether a shift [C, H, W] lies in few pixels."""
    return extent(tau) < PATCH


def in_patch(tau: Tensor, patch: Tensor) -> bool:
    """Whether `patch` [C, H, W] is one, and most of another shift [C, H, W] lies in it."""
    energy, place = _energy(tau), _energy(patch) > EDGE * _energy(patch).max()
    return is_patch(patch) and bool(energy[place].sum() > INSIDE * energy.sum())


def _energy(tau: Tensor) -> Tensor:
    """Return the squared size of each pixel [H, W]."""
    return tau.square().sum(0)
