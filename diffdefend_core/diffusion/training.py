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
