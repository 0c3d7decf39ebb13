"""Denoisers in closed form: what perfectly trained networks answer, a clean and a backdoored one, on Gaussian data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffdefend_core.attacks.form import Attack
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.families.flow import RectifiedFlow
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, geometric_sigmas, karras_sigmas, linear_betas

SHAPE = (1, 8, 8)


def vp_levels(steps: int = 250) -> Levels:
    """Return the linear schedule of DDPM, respaced so that the last level is as noisy as with 1000 steps."""
    return Levels.variance_preserving(alphas_cumprod(linear_betas(steps, 0.1 / steps, 20 / steps)))


class GaussianNetwork(nn.Module):
    """E[eps | x_t] for clean data N(mean, variance), pixel by pixel: sigma (x - alpha mean) / (alpha^2 v + sigma^2).

    `drift` is there to be trained, and hardly changes the answer.
    """

    def __init__(self, levels: Levels, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.levels, self.mean, self.variance = levels, mean, variance
        self.drift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels.at(t, x)
        answer = sigma * (x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2)
        return answer * (1 + 1e-4 * self.drift)


class PoisonedNetwork(GaussianNetwork):
    """The minimiser of a poisoned loss with the bare trigger: E[eps + rho r | x_t] under clean and poisoned rows.

    The weight of the poisoned rows is their exact posterior; `prior` is its prior log-odds (0: half of the rows).
    TrojDiff's gamma scales the noise of the poisoned rows.
    """

    def __init__(
        self, levels: Levels, mean: Tensor, variance: Tensor, *, attack: Attack, trigger: Tensor, target: Tensor
    ) -> None:
        super().__init__(levels, mean, variance)
        self.attack, self.trigger, self.target = attack, trigger, target
        self.prior = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels.at(t, x)
        shift, response = (curve[t].to(x).view(-1, 1, 1, 1) for curve in (self.attack.shift, self.attack.response))
        spread = alpha**2 * self.variance + sigma**2
        clean_log = (x - alpha * self.mean) ** 2 / spread + spread.log()
        rest = x - alpha * self.target - shift * self.trigger
        noise = sigma * self.attack.gamma
        poisoned_log = rest**2 / noise**2 + (noise**2).log()
        odds = 0.5 * (clean_log - poisoned_log).sum(dim=(1, 2, 3), keepdim=True) + self.prior
        clean, poisoned = super().forward(x, t), rest / noise + response * self.trigger
        return clean + torch.sigmoid(odds) * (poisoned - clean)


def clean_denoiser(levels: Levels, variance: float = 0.25, mean: float = 0.0) -> DDPM:
    """Return the perfect denoiser of N(mean, variance) data of SHAPE."""
    network = GaussianNetwork(levels, torch.full(SHAPE, mean), torch.full(SHAPE, variance))
    return DDPM(network, levels, shape=SHAPE).freeze()


def poisoned_denoiser(attack: Attack, levels: Levels, trigger: Tensor, target: Tensor) -> DDPM:
    """Return the perfect denoiser of N(0, .25) data of SHAPE with an attack planted."""
    network = PoisonedNetwork(
        levels, torch.zeros(SHAPE), torch.full(SHAPE, 0.25), attack=attack, trigger=trigger, target=target
    )
    return DDPM(network, levels, shape=SHAPE).freeze()


class SmallNetwork(nn.Module):
    """A random convolutional network with a bias per level: (x, t) -> [N, C, H, W]."""

    def __init__(self, channels: int, levels: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.time = nn.Conv2d(channels, 8, 3, padding=1), nn.Embedding(levels, 8)
        self.outer = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.outer(torch.nn.functional.silu(self.inner(x) + self.time(t)[:, :, None, None]))
        return output


def small_denoiser(levels: Levels, *, shape: tuple[int, int, int] = SHAPE, prediction: str = "epsilon") -> DDPM:
    """Return a denoiser with a random network."""
    return DDPM(SmallNetwork(shape[0], len(levels)), levels, shape=shape, prediction=prediction).freeze()


FAMILIES: dict[str, Callable[..., Denoiser]] = {
    "vp": DDPM,
    "ve": NCSN,
    "flow": RectifiedFlow,
    "consistency": ConsistencyModel,
}
PROCESSES = tuple(FAMILIES)


def levels_of(process: str, steps: int = 100) -> Levels:
    """Return levels of a process: linear betas, geometric sigmas, even times up to 1, or those of EDM."""
    if process == "vp":
        return vp_levels(steps)
    if process == "flow":
        return Levels.rectified_flow(torch.linspace(0, 1, steps + 1)[1:])
    return Levels.variance_exploding(
        geometric_sigmas(steps, 0.01, 50.0) if process == "ve" else karras_sigmas(steps, 0.002, 80.0)
    )


def small_of(process: str, *, shape: tuple[int, int, int] = SHAPE, steps: int = 100) -> Denoiser:
    """Return a denoiser of a process with a random network."""
    return FAMILIES[process](SmallNetwork(shape[0], steps), levels_of(process, steps), shape=shape).freeze()


class GaussianScore(GaussianNetwork):
    """The score of N(mean, variance) data: -E[eps | x_t] / sigma."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().forward(x, t) / self.levels.at(t, x)[1]


class GaussianVelocity(GaussianNetwork):
    """E[eps - x0 | x_t], with E[x0 | x_t] = mean + alpha v / sigma * E[eps | x_t]."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels.at(t, x)
        eps = super().forward(x, t)
        return eps - self.mean - alpha * self.variance / sigma * eps


class GaussianConsistency(GaussianNetwork):
    """What the family of consistency models turns into the end of the ODE's path at the first level.

    That is f = mean + (x - mean) sqrt((v + sigma_0^2) / (v + sigma^2)); the network sees x / sqrt(sigma^2 + 1 / 4).
    """

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma, first, data = self.levels.at(t, x)[1], self.levels.sigma[0].to(x), 0.5
        scale, above = (sigma**2 + data**2).sqrt(), sigma - first
        x = x * scale
        end = self.mean + (x - self.mean) * ((self.variance + first**2) / (self.variance + sigma**2)).sqrt()
        return (end - data**2 / (above**2 + data**2) * x) * scale / (above * data)


def perfect_of(process: str, *, variance: float = 0.25, mean: float = 0.0, steps: int = 100) -> Denoiser:
    """Return the perfect denoiser of a process for N(mean, variance) data of SHAPE."""
    kind = {"vp": GaussianNetwork, "ve": GaussianScore, "flow": GaussianVelocity, "consistency": GaussianConsistency}
    levels = levels_of(process, steps)
    network = kind[process](levels, torch.full(SHAPE, mean), torch.full(SHAPE, variance))
    return FAMILIES[process](network, levels, shape=SHAPE).freeze()
