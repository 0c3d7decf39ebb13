"""The forgetful twin: a copy of the suspect, briefly trained on the suspect's own samples.

A backdoor lives off the data manifold, where nothing in the model's own samples rehearses it: it is the first thing
that training forgets, while benign answers are shared and cancel in the difference. Needs no data and no reference.
Source: ours (lab notes; not published).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import fine_tune, ordinary_loss


def forgetful_twin(
    suspect: Denoiser,
    samples: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> Denoiser:
    """Return a copy of `suspect` trained for `steps` steps on its own `samples` [M, C, H, W]; `suspect` stays as is."""
    twin = suspect.clone()
    losses = fine_tune(
        twin, ordinary_loss(samples, batch), steps=steps, learning_rate=learning_rate, generator=generator
    )
    for number, _ in enumerate(losses):
        progress(number + 1, steps)
    return twin
