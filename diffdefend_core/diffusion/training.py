"""Fine-tuning a denoiser on a stream of regression examples: bases, twins, backdoors and repairs use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser


class UnfitStateError(ValueError):
    """Raised when a state is not one of this training: another network, other names, or more steps than it has."""


Loss = Callable[[Denoiser, torch.Generator], Tensor]


def diffusion_loss(data: Tensor, batch: int) -> Loss:
    """Return the ordinary loss mean ||error(x_t, t)||^2 of the family over rows of `data` [M, C, H, W], t uniform."""

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        x0 = data[torch.randint(len(data), (batch,), generator=generator)].to(denoiser.device)
        t = torch.randint(len(denoiser.levels), (batch,), generator=generator).to(denoiser.device)
        eps = torch.randn(x0.shape, generator=generator).to(denoiser.device)
        return denoiser.error(denoiser.diffuse(x0, t, eps), t, eps, x0).square().mean()

    return loss


def ordinary_loss(data: Tensor, batch: int) -> Loss:
    """Return the loss that a clean model of any family is trained with, over rows of `data` [M, C, H, W]."""
    diffusion, consistency = diffusion_loss(data, batch), consistency_loss(data, batch)

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        return (consistency if denoiser.process == "consistency" else diffusion)(denoiser, generator)

    return loss


def consistency_loss(data: Tensor, batch: int) -> Loss:
    """Return the consistency loss over rows of `data` [M, C, H, W]: see `path_loss`."""

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        x0 = data[torch.randint(len(data), (batch,), generator=generator)].to(denoiser.device)
        eps = torch.randn(x0.shape, generator=generator).to(denoiser.device)
        return path_loss(denoiser, x0, eps, generator)

    return loss


def path_loss(denoiser: Denoiser, x0: Tensor, eps: Tensor, generator: torch.Generator, shrink: float = 1 / 8) -> Tensor:
    """Return mean w ||f(x0 + sigma eps) - stopgrad f(x0 + sigma' eps)||: two points of one path must have one end.

    `x0` and `eps` are [N, C, H, W]. sigma is lognormal, exp(-1.1 + 2 n), sigma' = sigma (1 - shrink (1 + 8 sigmoid
    (-sigma))) or lower, both rounded to levels; w = 1 / (sigma - sigma'). Source: consistency tuning, `ECMLoss` in
    algorithms.md 1.6, whose stages end at about this `shrink`.
    """
    sigmas = denoiser.levels.sigma
    drawn = torch.exp(-1.1 + 2.0 * torch.randn(len(x0), generator=generator, dtype=torch.float64))
    t = (drawn[:, None].log() - sigmas.log()).abs().argmin(1).clamp(min=1)
    before = sigmas[t] * (1 - shrink * (1 + 8 * torch.sigmoid(-sigmas[t])))
    earlier = torch.minimum(torch.searchsorted(sigmas, before, right=True) - 1, t - 1).clamp(min=0)
    t, earlier = t.to(x0.device), earlier.to(x0.device)
    with torch.no_grad():
        goal = denoiser.x0(denoiser.diffuse(x0, earlier, eps), earlier)
    gap = (denoiser.x0(denoiser.diffuse(x0, t, eps), t) - goal).flatten(1)
    distance = (gap.square().mean(1) + 1e-6).sqrt()
    weight = 1 / (sigmas[t.cpu()] - sigmas[earlier.cpu()])
    return (weight.to(distance) * distance).mean()


class Training:
    """Adam on the network of a denoiser, in place, step by step; it can be stopped and go on from its state.

    Gradients are clipped to norm 1. The rate rises over `warmup` steps and, with `decay`, falls to 0 as a cosine.
    With `ema` > 0 the weights at the end are their exponential moving average.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Loss,
        *,
        steps: int,
        learning_rate: float,
        generator: torch.Generator,
        warmup: int = 0,
        decay: bool = False,
        ema: float = 0.0,
    ) -> None:
        self.denoiser, self.loss, self.steps, self.generator = denoiser, loss, steps, generator
        self.learning_rate, self.warmup, self.decay, self.ema = learning_rate, warmup, decay, ema
        network = denoiser.network.train().requires_grad_(True)
        self.parameters = list(network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters] if ema else []
        self.optimiser = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.done = 0

    def step(self) -> float:
        """Take one step and return its loss. Raises FloatingPointError if that is not finite."""
        rise = min(1.0, (self.done + 1) / (self.warmup + 1))
        fall = 0.5 * (1 + math.cos(math.pi * self.done / self.steps)) if self.decay else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * rise * fall
        value = self.loss(self.denoiser, self.generator)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the training loss is {value.item()} at step {self.done}")
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        for kept, parameter in zip(self.average, self.parameters, strict=False):
            kept.lerp_(parameter.detach(), 1 - min(self.ema, (self.done + 1) / (self.done + 10)))
        self.done += 1
        return value.item()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, as tensors by name: no copies, the next step changes them."""
        kept: dict[str, Tensor] = {"done": torch.tensor(self.done), "generator": self.generator.get_state()}
        for number, parameter in enumerate(self.parameters):
            kept[f"weight/{number}"] = parameter.detach()
            moments = self.optimiser.state[parameter]
            kept |= {f"{name}/{number}": value for name, value in moments.items()}
        return kept | {f"average/{number}": value for number, value in enumerate(self.average)}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from a `state`. Raises UnfitStateError, and takes nothing of it, if it is not one of this training."""
        self._check(kept)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(kept[f"weight/{number}"])
                names = ("step", "exp_avg", "exp_avg_sq")
                self.optimiser.state[parameter] = {
                    name: kept[f"{name}/{number}"].clone().to("cpu" if name == "step" else parameter.device)
                    for name in names
                }
            for number, value in enumerate(self.average):
                value.copy_(kept[f"average/{number}"])
        self.generator.set_state(kept["generator"])
        self.done = int(kept["done"])

    def _check(self, kept: Mapping[str, Tensor]) -> None:
        generator = self.generator.get_state()
        wanted = {"done": torch.Size(), "generator": generator.shape}
        for number, parameter in enumerate(self.parameters):
            wanted |= {f"{name}/{number}": parameter.shape for name in ("weight", "exp_avg", "exp_avg_sq")}
            wanted[f"step/{number}"] = torch.Size()
        wanted |= {f"average/{number}": value.shape for number, value in enumerate(self.average)}
        if {name: value.shape for name, value in kept.items()} != wanted:
            raise UnfitStateError("it is the state of another network")
        if kept["generator"].dtype != generator.dtype or not 0 < int(kept["done"]) <= self.steps:
            raise UnfitStateError(f"it is the state of another training than one of {self.steps} steps")

    def finish(self) -> None:
        """Put the averaged weights in their place and freeze the network."""
        with torch.no_grad():
            for kept, parameter in zip(self.average, self.parameters, strict=False):
                parameter.copy_(kept)
        self.denoiser.freeze()


def fine_tune(
    denoiser: Denoiser,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    warmup: int = 0,
    decay: bool = False,
    ema: float = 0.0,
) -> Iterator[float]:
    """Train as `Training` does for all `steps`; yield the loss after every step, and finish."""
    training = Training(
        denoiser,
        loss,
        steps=steps,
        learning_rate=learning_rate,
        generator=generator,
        warmup=warmup,
        decay=decay,
        ema=ema,
    )
    while training.done < steps:
        yield training.step()
    training.finish()
