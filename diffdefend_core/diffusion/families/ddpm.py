"""DDPM: a variance preserving model that predicts the noise, the clean data or the velocity."""

from __future__ import annotations

from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels


class DDPM(Denoiser):
    """A VP model over pixels (Ho et al. 2020); `network(x, t)` returns [N, C, H, W].

    `prediction` is `epsilon`, `sample` (x0) or `v_prediction` (alpha * eps - sigma * x0, Salimans & Ho 2022).
    """

    family = "ddpm"

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        *,
        shape: tuple[int, int, int],
        value_range: tuple[float, float] = (-1.0, 1.0),
        prediction: str = "epsilon",
    ) -> None:
        if prediction not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction {prediction!r} is not epsilon, sample or v_prediction")
        self.network, self.levels, self.shape = network, levels, shape
        self.value_range, self.prediction = value_range, prediction

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise [N, C, H, W], converted from what the network predicts."""
        output: Tensor = self.network(x, t)
        if self.prediction == "epsilon":
            return output
        alpha, sigma = self.levels.at(t, x)
        if self.prediction == "sample":
            return (x - alpha * output) / sigma
        return alpha * output + sigma * x
