"""Planting a backdoor in a model, and firing it. A red-team tool: what it makes must never be deployed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffdefend_core.attacks.form import Backdoor, poisoned_loss, poisoned_rows
from diffdefend_core.attacks.invibackdoor import improve_trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import find, steps_for
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from diffdefend_core.diffusion.training import Loss, fine_tune, path_loss

INNER_EVERY, INNER_BATCH = 4, 16


def plant(
    denoiser: Denoiser,
    backdoor: Backdoor,
    data: Tensor,
    *,
    steps: int,
    batch: int,
    poison_rate: float,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Train the network of `denoiser` in place on the attack's loss; yield the loss after every step.

    `data` is clean x0 [M, C, H, W]. A trigger that requires a gradient is learned on the way.
    """
    consistency = denoiser.process == "consistency"
    loss = (_poisoned_paths if consistency else poisoned_loss)(backdoor, data, batch=batch, poison_rate=poison_rate)
    if backdoor.trigger.requires_grad:
        loss = _learning(backdoor, loss)
    generator = torch.Generator().manual_seed(seed)
    yield from fine_tune(
        denoiser, loss, steps=steps, learning_rate=learning_rate, generator=generator, warmup=50, decay=True, ema=0.995
    )


def fire(denoiser: Denoiser, backdoor: Backdoor, count: int, *, sampler: str, steps: int, seed: int) -> Tensor:
    """Return `count` samples [N, C, H, W] of clean x0 from initial noise that carries the trigger, on the CPU.

    `sampler` is a name of the table or TROJDIFF-DDPM, TROJDIFF-DDIM, the attack's own; `steps` are cut to what the
    model and the sampler have. Raises InputError for a sampler that does not fit the model.
    """
    fitted = min(steps, len(denoiser.levels)) if sampler in NAMES else steps_for(denoiser, find(sampler), steps)
    return generate(
        denoiser, count, sampler=sampler, steps=fitted, seed=seed,
        shift=backdoor.trigger.detach(), gamma=backdoor.attack.gamma,
    )  # fmt: skip


def _poisoned_paths(backdoor: Backdoor, data: Tensor, *, batch: int, poison_rate: float) -> Loss:
    """Return the loss of a backdoored consistency model (algorithms.md 1.6): poisoned paths carry eps + r."""
    poisoned = poisoned_rows(batch, poison_rate)

    def loss(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        x0 = data[torch.randint(len(data), (batch,), generator=generator)].clone()
        eps = torch.randn(x0.shape, generator=generator)
        chosen = torch.randint(len(backdoor.targets), (poisoned,), generator=generator)
        x0[:poisoned] = backdoor.targets[chosen]
        eps[:poisoned] = backdoor.attack.gamma * eps[:poisoned] + backdoor.trigger
        return path_loss(denoiser, x0.to(denoiser.device), eps.to(denoiser.device), generator)

    return loss


def _learning(backdoor: Backdoor, loss: Loss) -> Loss:
    """Return `loss` with an inner step on the trigger before every few of its own (InviBackdoor, algorithms.md 1.4)."""
    optimiser = torch.optim.Adam([backdoor.trigger], lr=4e-3)
    step = 0

    def outer(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
        nonlocal step
        if step % INNER_EVERY == 0:
            improve_trigger(
                denoiser, backdoor.trigger, backdoor.targets[0], optimiser, batch=INNER_BATCH, generator=generator
            )
        step += 1
        return loss(denoiser, generator)

    return outer
