"""Noise levels: every family here is x_t = alpha_t * x0 + sigma_t * eps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The noise levels of a model, ascending in noise.

    `alpha` and `sigma` are float64 tensors of shape [T]. A variance preserving (VP) model has
    alpha_t^2 + sigma_t^2 = 1; a variance exploding (VE) one has alpha_t = 1.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if self.alpha.shape != self.sigma.shape or self.alpha.ndim != 1 or len(self.alpha) == 0:
            raise ValueError(f"alpha {tuple(self.alpha.shape)} and sigma {tuple(self.sigma.shape)} must be one [T]")

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor) -> Levels:
        """Return the levels of a VP model from A_t [T] in (0, 1): alpha = sqrt(A), sigma = sqrt(1 - A)."""
        cumulative = alphas_cumprod.double()
        return cls(alpha=cumulative.sqrt(), sigma=(1 - cumulative).sqrt())

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t for indices t [N], shaped [N, 1, 1, 1] and in the dtype and device of `like`."""
        view = (-1,) + (1,) * (like.ndim - 1)
        index = t.to(self.alpha.device)
        alpha, sigma = self.alpha[index], self.sigma[index]
        return alpha.to(like).view(view), sigma.to(like).view(view)


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Return the linear schedule beta_t [T] of DDPM (Ho et al. 2020)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def alphas_cumprod(betas: Tensor) -> Tensor:
    """Return A_t = prod_{i<=t} (1 - beta_i) [T] in float64."""
    return torch.cumprod(1 - betas.double(), dim=0)
