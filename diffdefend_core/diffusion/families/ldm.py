"""Latent diffusion: a VP model in the space of an autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels


class Autoencoder(Protocol):
    """Between pictures and latents, both [N, C, H, W]; without any scaling factor."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Return latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures."""
        ...


class LatentDiffusion(DDPM):
    """A VP model whose x0 are latents times `scaling_factor`; the autoencoder is frozen and never trained."""

    family = "ldm"

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        autoencoder: Autoencoder,
        *,
        shape: tuple[int, int, int],
        picture_shape: tuple[int, int, int],
        value_range: tuple[float, float] = (-1.0, 1.0),
        prediction: str = "epsilon",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__(network, levels, shape=shape, value_range=value_range, prediction=prediction)
        self.autoencoder, self.scaling_factor, self._picture_shape = autoencoder, scaling_factor, picture_shape

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of what the autoencoder decodes."""
        return self._picture_shape

    @property
    def clean_range(self) -> None:
        """Latents have no bounds."""
        return None

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Return the pictures of latents."""
        return self.autoencoder.decode(x / self.scaling_factor)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures, times the scaling factor."""
        return self.autoencoder.encode(pictures) * self.scaling_factor
