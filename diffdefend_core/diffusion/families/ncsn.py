"""NCSN and score-SDE VE: a variance exploding model whose network predicts the score (Song et al. 2019, 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels


class NCSN(Denoiser):
    """A VE model over pixels; `network(x, t)` returns the score [N, C, H, W], the gradient of log p_t at x_t.

    All else works on -sigma * score: raw scores are scaled by 1 / sigma, and a loss on them is blind to high noise.
    """

    family = "ncsn"

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        *,
        shape: tuple[int, int, int],
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.network, self.levels, self.shape, self.value_range = network, levels, shape, value_range

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return -sigma_t * score [N, C, H, W]."""
        _, sigma = self.levels.at(t, x)
        score: Tensor = self.network(x, t)
        return -sigma * score
