"""Multi-timestep joint search of one shift to which the suspect and a reference answer differently.

One shift tau serves all levels (published: DIFFDEFEND, "multi-stage joint inversion"); it lies on a sphere of fixed
norm, so that neither zero nor infinity is attractive and no scale, sign or response of the attack is assumed. The
reference is the forgetful twin or a trusted model: what both answer alike cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffdefend_core.diffusion.response import Bench, rms
from diffdefend_core.options import InversionOptions


@dataclass
class Track:
    """One start on its way: a direction [C, H, W] of unit rms, its optimiser, and the loss after every iteration."""

    name: str
    direction: Tensor
    generator: torch.Generator
    optimiser: torch.optim.Adam
    loss: list[float] = field(default_factory=list)


def starts(shape: tuple[int, int, int], count: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield named start directions: -U[0,1] and +U[0,1] (both signs of the usual triggers), then N(0, I) ones."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        uniform = torch.rand(shape, generator=generator)
        normal = torch.randn(shape, generator=generator)
        yield (
            (("negative", -uniform), ("positive", uniform))[number] if number < 2 else (f"normal-{number - 1}", normal)
        )


def race(
    bench: Bench,
    shape: tuple[int, int, int],
    options: InversionOptions,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Track]:
    """Return the finished tracks, best first: all starts run `race_iterations`, the best `finalists` go on.

    The loss is minus the logarithm of how differently suspect and reference answer to the shift.
    """
    tracks = [
        _track(name, start.to(bench.probes[0].x0), seed + number, options)
        for number, (name, start) in enumerate(starts(shape, options.starts, seed))
    ]
    rest = options.iterations - options.race_iterations
    total, done = options.starts * options.race_iterations + options.finalists * rest, 0

    def advance(track: Track, iterations: int) -> None:
        nonlocal done
        for _ in range(iterations):
            _iterate(track, bench, options)
            done += 1
            progress(done, total)

    for track in tracks:
        advance(track, options.race_iterations)
    finalists = sorted(tracks, key=_standing)[: options.finalists]
    for track in finalists:
        advance(track, rest)
    return sorted(finalists, key=_standing)


def _track(name: str, start: Tensor, seed: int, options: InversionOptions) -> Track:
    direction = (start / rms(start)).requires_grad_(True)
    return Track(
        name=name,
        direction=direction,
        generator=torch.Generator().manual_seed(seed),
        optimiser=torch.optim.Adam([direction], lr=options.learning_rate),
    )


def _iterate(track: Track, bench: Bench, options: InversionOptions) -> None:
    number = int(torch.randint(len(bench.probes), (1,), generator=track.generator))
    delta, delta_reference = bench.shifts(options.rms * track.direction / rms(track.direction), number)
    # at no difference at all the gradient is 0 instead of NaN
    size = ((delta - delta_reference).square().mean() + 1e-20).sqrt()
    loss = -torch.log(size / options.rms + 1e-8)
    track.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    track.optimiser.step()
    with torch.no_grad():
        track.direction /= rms(track.direction)
    track.loss.append(loss.item())


def _standing(track: Track) -> float:
    """Return the mean of the last losses; a track that is not finite comes last."""
    recent = track.loss[-10:]
    standing = sum(recent) / len(recent)
    return standing if math.isfinite(standing) else math.inf
