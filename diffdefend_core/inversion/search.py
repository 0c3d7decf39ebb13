"""Multi-timestep joint search of one shift that makes an objective small at several levels.

One shift tau serves all levels (published: DIFFDEFEND, "multi-stage joint inversion"); it lies on a sphere of fixed
norm, so that neither zero nor infinity is attractive and no scale, sign or response of the attack is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffdefend_core.diffusion.response import rms
from diffdefend_core.inversion.objectives import Objective
from diffdefend_core.options import InversionOptions


@dataclass
class Track:
    """One start on its way: a direction [C, H, W] of unit rms, the norm of its shift, its optimiser, and the losses.

    Losses stay on the device, so that no iteration waits for it.
    """

    direction: Tensor
    norm: float
    generator: torch.Generator
    optimiser: torch.optim.Adam
    loss: list[Tensor] = field(default_factory=list)

    @property
    def shift(self) -> Tensor:
        """The shift [C, H, W] at its norm."""
        return self.norm * self.direction / rms(self.direction)


def starts(shape: tuple[int, int, int], count: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield named start directions: -U[0,1] and +U[0,1] (both signs of the usual triggers), then N(0, I) ones."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        uniform = torch.rand(shape, generator=generator)
        normal = torch.randn(shape, generator=generator)
        yield (
            (("negative", -uniform), ("positive", uniform))[number] if number < 2 else (f"normal-{number - 1}", normal)
        )


def normal_starts(shape: tuple[int, int, int], count: int, seed: int) -> list[Tensor]:
    """Return start directions [C, H, W] from N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def race(
    objective: Objective,
    probes: int,
    begun: Sequence[Tensor],
    options: InversionOptions,
    *,
    norm: float,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> Track:
    """Return the best track: all starts [C, H, W] run `race_iterations` of the objective, the best one `iterations`.

    Each iteration draws one of the `probes` of the objective. `norm` is the rms of the shift per pixel.
    """
    tracks = [_track(start, seed + number, norm, learning_rate) for number, start in enumerate(begun)]
    total, done = race_length(options), 0

    def advance(track: Track, iterations: int) -> None:
        nonlocal done
        for _ in range(iterations):
            _iterate(track, objective, probes)
            done += 1
            progress(done, total)

    for track in tracks:
        advance(track, options.race_iterations)
    best = min(tracks, key=_standing)
    advance(best, options.iterations - options.race_iterations)
    return best


def race_length(options: InversionOptions) -> int:
    """Return the number of iterations of one race."""
    return (options.starts - 1) * options.race_iterations + options.iterations


def _track(start: Tensor, seed: int, norm: float, learning_rate: float) -> Track:
    direction = (start / rms(start)).requires_grad_(True)
    return Track(
        direction=direction,
        norm=norm,
        generator=torch.Generator().manual_seed(seed),
        optimiser=torch.optim.Adam([direction], lr=learning_rate),
    )


def _iterate(track: Track, objective: Objective, probes: int) -> None:
    number = int(torch.randint(probes, (1,), generator=track.generator))
    loss = objective(track.shift, number)
    track.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    track.optimiser.step()
    with torch.no_grad():
        track.direction /= rms(track.direction)
    track.loss.append(loss.detach())


def _standing(track: Track) -> float:
    """Return the mean of the last losses; a track that is not finite comes last."""
    standing = torch.stack(track.loss[-6:]).mean().item()
    return standing if math.isfinite(standing) else math.inf
