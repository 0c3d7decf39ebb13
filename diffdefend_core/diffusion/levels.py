"""Noise levels: every family here is x_t = alpha_t * x0 + sigma_t * eps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# the largest alpha / sigma at the last level: above it the initial noise would carry the picture
TERMINAL_SIGNAL = 0.1


@dataclass(frozen=True)
class Levels:
    """The noise levels of a model, ascending in noise.

    `alpha` and `sigma` are float64 tensors of shape [T]. `kind` is `vp` (variance preserving, alpha^2 + sigma^2 = 1),
    `ve` (variance exploding, alpha = 1) or `flow` (rectified flow, alpha = 1 - sigma). Raises ValueError for levels of
    another form, that do not rise, or whose last one is not noise: there is nothing to sample from.
    """

    alpha: Tensor
    sigma: Tensor
    kind: str = field(init=False)
    _tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.alpha.shape != self.sigma.shape or self.alpha.ndim != 1 or len(self.alpha) == 0:
            raise ValueError(f"alpha {tuple(self.alpha.shape)} and sigma {tuple(self.sigma.shape)} must be one [T]")
        ratio = self.alpha / self.sigma
        if not bool((ratio[1:] < ratio[:-1]).all()) or not bool((self.sigma > 0).all()):
            raise ValueError("the noise levels do not rise")
        if ratio[-1] > TERMINAL_SIGNAL:
            raise ValueError(
                f"the last level has alpha / sigma {ratio[-1].item():.3g}, at most {TERMINAL_SIGNAL} is terminal noise"
            )
        object.__setattr__(self, "kind", _kind(self.alpha, self.sigma))

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor) -> Levels:
        """Return the levels of a VP model from A_t [T] in (0, 1): alpha = sqrt(A), sigma = sqrt(1 - A)."""
        cumulative = alphas_cumprod.double()
        return cls(alpha=cumulative.sqrt(), sigma=(1 - cumulative).sqrt())

    @classmethod
    def variance_exploding(cls, sigmas: Tensor) -> Levels:
        """Return the levels of a VE model from ascending sigma_t [T]: alpha = 1."""
        return cls(alpha=torch.ones(len(sigmas), dtype=torch.float64), sigma=sigmas.double())

    @classmethod
    def rectified_flow(cls, times: Tensor) -> Levels:
        """Return the levels of a rectified flow from ascending t [T] in (0, 1]: alpha = 1 - t, sigma = t."""
        return cls(alpha=1 - times.double(), sigma=times.double())

    @property
    def initial_scale(self) -> float:
        """The scale of the initial state: x_T = initial_scale * (eps + trigger); sigma_T for VE, else 1."""
        return self.sigma[-1].item() if self.kind == "ve" else 1.0

    @property
    def carried(self) -> Tensor:
        """The shift s_t [T] of x_t under a trigger of the initial noise, per unit of the trigger.

        1 - alpha_t / alpha_0 for VP (the step of BadDiffusion, Villan and InviBackdoor), sigma_t for VE and flow.
        """
        return 1 - self.alpha / self.alpha[0] if self.kind == "vp" else self.sigma

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t for indices t [N], shaped [N, 1, 1, 1] and in the dtype and device of `like`.

        The curves are kept there, so that indices on a GPU are never waited for.
        """
        view = (-1,) + (1,) * (like.ndim - 1)
        place = (like.device, like.dtype)
        if place not in self._tables:
            self._tables[place] = (self.alpha.to(like), self.sigma.to(like))
        alpha, sigma = self._tables[place]
        index = t.to(like.device)
        return alpha[index].view(view), sigma[index].view(view)


def _kind(alpha: Tensor, sigma: Tensor) -> str:
    one = torch.ones_like(alpha)
    forms = {"ve": alpha, "flow": alpha + sigma, "vp": alpha**2 + sigma**2}
    for kind, value in forms.items():
        if torch.allclose(value, one, rtol=0, atol=1e-6):
            return kind
    raise ValueError("the levels are neither variance preserving nor variance exploding nor those of a flow")


def geometric_sigmas(steps: int, low: float = 0.01, high: float = 380.0) -> Tensor:
    """Return the ascending geometric sigma_t [T] of NCSN / score-SDE VE (Song et al. 2021)."""
    return torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)


def karras_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return the ascending sigma_t [T] of Karras et al. 2022, equation 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas: Tensor = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    return sigmas


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Return the linear schedule beta_t [T] of DDPM (Ho et al. 2020)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def alphas_cumprod(betas: Tensor) -> Tensor:
    """Return A_t = prod_{i<=t} (1 - beta_i) [T] in float64."""
    return torch.cumprod(1 - betas.double(), dim=0)
