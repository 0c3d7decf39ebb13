"""Consistency models over EDM levels: the network maps any point of a path to its start (Song et al. 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels


class ConsistencyModel(Denoiser):
    """f(x, sigma) = c_skip x + c_out network(x / sqrt(sigma^2 + sigma_data^2), t), with f = x at the first level.

    With s = sigma - sigma_0: c_skip = d^2 / (s^2 + d^2) and c_out = s d / sqrt(sigma^2 + d^2), d = `sigma_data` (Song
    et al. 2023, appendix C).
    """

    family = "consistency"

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        *,
        shape: tuple[int, int, int],
        value_range: tuple[float, float] = (-1.0, 1.0),
        sigma_data: float = 0.5,
    ) -> None:
        self.network, self.levels, self.shape = network, levels, shape
        self.value_range, self.sigma_data = value_range, sigma_data

    @property
    def process(self) -> str:
        """`consistency`: the answer is the end of the path, not the mean of x0, so that no ODE or SDE solver fits."""
        return "consistency"

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """Return f(x, sigma_t) [N, C, H, W]."""
        _, sigma = self.levels.at(t, x)
        above, data = sigma - self.levels.sigma[0].item(), self.sigma_data
        scale = (sigma**2 + data**2).sqrt()
        output: Tensor = self.network(x / scale, t)
        return data**2 / (above**2 + data**2) * x + above * data / scale * output

    def error(self, x: Tensor, t: Tensor, eps: Tensor, x0: Tensor) -> Tensor:
        """Return (f - x0) sqrt(sigma^2 + d^2) / (sigma d): the weight of EDM, for the training that comes first."""
        _, sigma = self.levels.at(t, x)
        return (self.x0(x, t) - x0) * (sigma**2 + self.sigma_data**2).sqrt() / (sigma * self.sigma_data)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise that f implies, (x - f) / sigma_t [N, C, H, W]."""
        _, sigma = self.levels.at(t, x)
        return (x - self.x0(x, t)) / sigma
