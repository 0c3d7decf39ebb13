"""The one contract underneath: what every model family answers.

Inversion, detection, purification and evaluation see a `Denoiser` and nothing else. Nothing outside a
family may assume a value range, a number of steps, a schedule, a number of channels or a class of diffusers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from diffdefend_core.diffusion.levels import Levels


class Denoiser(ABC):
    """A network with its noise levels: for x_t [N, C, H, W] and level indices t it answers noise and x0.

    `family` is a word of `diffdefend list families`, or the name of an adapter; `shape` is (C, H, W) of x_t, and
    `value_range` the (low, high) of the pictures that `decode` returns. A latent model has x_t in another space than
    its pictures: `picture_shape` is theirs, and `clean_range` (None: unbounded) that of clean x0. `network` holds
    what is trained; other parts, such as a decoder, are attributes of their own.
    """

    family: str
    network: nn.Module
    levels: Levels
    shape: tuple[int, int, int]
    value_range: tuple[float, float]

    @property
    def process(self) -> str:
        """Which samplers fit: `vp`, `ve` or `flow` by the levels; `consistency` for a consistency model."""
        return self.levels.kind

    @property
    def kind(self) -> str:
        """The process, and whether it runs on the latents of an autoencoder: what calibrations go by."""
        return self.process if self.picture_shape == self.shape else f"latent {self.process}"

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the pictures."""
        return self.shape

    @property
    def clean_range(self) -> tuple[float, float] | None:
        """The (low, high) of clean x0, None where it has no bounds."""
        return self.value_range

    @abstractmethod
    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise [N, C, H, W] of x_t [N, C, H, W] at level indices t [N] (int64)."""

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean data [N, C, H, W]: (x_t - sigma_t * noise) / alpha_t, not clamped."""
        alpha, sigma = self.levels.at(t, x)
        return (x - sigma * self.noise(x, t)) / alpha

    def diffuse(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t = alpha_t * x0 + sigma_t * eps, all [N, C, H, W], t [N]."""
        alpha, sigma = self.levels.at(t, x0)
        return alpha * x0 + sigma * eps

    def error(self, x: Tensor, t: Tensor, eps: Tensor, x0: Tensor) -> Tensor:
        """Return the error [N, C, H, W] of the answer at x_t against the noise `eps`, in the unit of the training loss.

        `x0` is the clean data that belongs to `eps`; only families that are trained on both look at it.
        """
        return self.noise(x, t) - eps

    def decode(self, x: Tensor) -> Tensor:
        """Return the pictures [N, C, H, W] of clean x0, in `value_range` but not clamped."""
        return x

    def encode(self, pictures: Tensor) -> Tensor:
        """Return clean x0 of pictures [N, C, H, W] in `value_range`: the inverse of `decode`."""
        return pictures

    def pictures(self, x: Tensor) -> Tensor:
        """Return the pictures of clean x0 in [0, 1]."""
        return to_unit(self.decode(x), self.value_range)

    def clone(self) -> Self:
        """Return a copy with weights of its own."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network)
        return twin

    def freeze(self) -> Self:
        """Put the network in evaluation mode without parameter gradients; return self."""
        self.network.eval().requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.network.parameters()).device


def to_unit(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return x mapped from `value_range` to [0, 1] and clamped there: the range of every image metric."""
    low, high = value_range
    return ((x - low) / (high - low)).clamp(0, 1)
