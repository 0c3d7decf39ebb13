"""What all samplers share: the signature, the entry of the table and the step spacing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators

Progress = Callable[[int, int], None]


class Sampler(Protocol):
    """Every sampler: from an initial state (which may carry a trigger) to clean x0 in the model's own space."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
    ) -> Tensor:
        """Return samples [N, C, H, W] from the initial state x [N, C, H, W] in `steps` steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A sampler in the table: its published name, which processes it fits, its usual number of steps, and its kind.

    `processes` are those of `Denoiser.process`. A `stochastic` sampler draws noise on the way, so that an attack
    trained for it leaves its path under a deterministic one, and the reverse (algorithms.md 0.4). `most_steps` is set
    for a sampler that gains nothing from more; `calls` is the number of network calls of a step.
    """

    name: str
    run: Sampler
    processes: frozenset[str]
    steps: int
    stochastic: bool
    source: str
    most_steps: int | None = None
    calls: int = 1


def trailing_steps(total: int, steps: int) -> list[int]:
    """Return `steps` descending level indices that start at the last level ("trailing" spacing).

    A trigger lives at the last level: "leading" spacing would start below it (algorithms.md, section 3).
    Raises ValueError unless 1 <= steps <= total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps do not fit a model of {total} levels")
    return [round(total - number * total / steps) - 1 for number in range(steps)]
