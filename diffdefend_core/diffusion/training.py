"""Fine-tuning a denoiser on a stream of regression examples: bases, twins, backdoors and repairs use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser

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
    """Train the network of `denoiser` in place with Adam; yield the loss after every step.

    Gradients are clipped to norm 1. The rate rises over `warmup` steps and, with `decay`, falls to 0 as a cosine.
    With `ema` > 0 the weights at the end are their exponential moving average. Raises FloatingPointError at a
    loss that is not finite.
    """
    network = denoiser.network.train().requires_grad_(True)
    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters] if ema else []
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        rise = min(1.0, (step + 1) / (warmup + 1))
        fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()) if decay else 1.0
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rise * fall
        value = loss(denoiser, generator)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the training loss is {value.item()} at step {step}")
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for kept, parameter in zip(average, parameters, strict=False):
            kept.lerp_(parameter.detach(), 1 - min(ema, (step + 1) / (step + 10)))
        yield value.item()
    with torch.no_grad():
        for kept, parameter in zip(average, parameters, strict=False):
            parameter.copy_(kept)
    denoiser.freeze()
