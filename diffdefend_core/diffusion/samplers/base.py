"""What all samplers share: the signature, the step spacing and the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators

Progress = Callable[[int, int], None]


class Sampler(Protocol):
    """Every sampler: from an initial state (which may carry a trigger) to samples in the model's range."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
    ) -> Tensor:
        """Return samples [N, C, H, W] from the initial state x [N, C, H, W] in `steps` steps."""
        ...


def trailing_steps(total: int, steps: int) -> list[int]:
    """Return `steps` descending level indices that start at the last level ("trailing" spacing).

    A trigger lives at the last level: "leading" spacing would start below it (algorithms.md, section 3).
    Raises ValueError unless 1 <= steps <= total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps do not fit a model of {total} levels")
    return [round(total - number * total / steps) - 1 for number in range(steps)]
