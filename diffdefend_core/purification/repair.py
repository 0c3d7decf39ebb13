"""One round of purification: fine-tune a copy of the suspect on the removal and the retention loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import fine_tune
from diffdefend_core.options import PurificationOptions
from diffdefend_core.purification.losses import draw_rows, removal_target

# Levels by alpha / sigma. Removal acts at the noisy end alone: there the benign answer to a shift is known exactly,
# and a state that leaves the poisoned path there does not meet the backdoor again. All levels would cost quality.
REMOVAL_SIGNALS = (0.005, 0.1)
RETENTION_SIGNALS = (0.005, 100.0)


@dataclass(frozen=True)
class Repair:
    """The repaired model, the loss curves of its round and the evaluations spent (forward 1, forward + backward 3)."""

    denoiser: Denoiser
    removal_loss: tuple[float, ...]
    retention_loss: tuple[float, ...]
    forward_equivalents: int


def repair(
    model: Denoiser,
    phi: Denoiser,
    triggers: Tensor,
    samples: Tensor,
    options: PurificationOptions,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Repair:
    """Return a repaired copy of `model`; `phi` is the frozen suspect, `triggers` [K, C, H, W] every shift found so far.

    L = L_removal + eta * L_retention: with the trigger the model must answer as without it, plus the benign linear
    response (target R3); without it, as phi does. `samples` [M, C, H, W] are phi's own.
    """
    generator = torch.Generator().manual_seed(seed)
    removal: list[float] = []
    retention: list[float] = []

    def loss(denoiser: Denoiser, draws: torch.Generator) -> Tensor:
        triggered = draw_rows(phi, samples, triggers, options.removal_batch, REMOVAL_SIGNALS, draws)
        plain = draw_rows(phi, samples, triggers, options.retention_batch, RETENTION_SIGNALS, draws)
        with torch.no_grad():
            goal = torch.cat([removal_target(phi, samples, triggered), phi.noise(plain.x, plain.t)])
        answer = denoiser.noise(torch.cat([triggered.x + triggered.shift, plain.x]), torch.cat([triggered.t, plain.t]))
        errors = (answer - goal).square().mean((1, 2, 3))
        removed, retained = errors[: options.removal_batch].mean(), errors[options.removal_batch :].mean()
        removal.append(removed.item())
        retention.append(retained.item())
        return removed + options.retention_weight * retained

    repaired = model.clone()
    steps = fine_tune(
        repaired,
        loss,
        steps=options.steps,
        learning_rate=options.learning_rate,
        generator=generator,
        warmup=20,
        decay=True,
        ema=0.99,
    )
    for number, _ in enumerate(steps):
        progress(number + 1, options.steps)
    return Repair(
        denoiser=repaired,
        removal_loss=tuple(removal),
        retention_loss=tuple(retention),
        forward_equivalents=options.steps * (options.removal_batch + options.retention_batch) * (3 + 1),
    )
