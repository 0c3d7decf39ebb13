"""Rectified flow and flow matching: x_t = (1 - t) x0 + t eps, the network predicts the velocity (Liu et al. 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels


class RectifiedFlow(Denoiser):
    """A flow over pixels; `network(x, t)` returns the velocity dx_t / dt = eps - x0 [N, C, H, W] at level indices t."""

    family = "flow"

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        *,
        shape: tuple[int, int, int],
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        self.network, self.levels, self.shape, self.value_range = network, levels, shape, value_range

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise x + (1 - t) * velocity [N, C, H, W]."""
        alpha, _ = self.levels.at(t, x)
        velocity: Tensor = self.network(x, t)
        return x + alpha * velocity

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean data x - t * velocity [N, C, H, W]; also defined at t = 1, where alpha is 0."""
        _, sigma = self.levels.at(t, x)
        velocity: Tensor = self.network(x, t)
        return x - sigma * velocity

    def error(self, x: Tensor, t: Tensor, eps: Tensor, x0: Tensor) -> Tensor:
        """Return velocity - (eps - x0): the noise alone says nothing near t = 1, where x_t is the noise."""
        error: Tensor = self.network(x, t) - (eps - x0)
        return error
