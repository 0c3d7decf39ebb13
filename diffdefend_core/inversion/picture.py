"""The search of a consistency model: a shift under which noise becomes a picture that its twin does not paint.

Its triggers leave the response as it is and change what is painted: what is even in that is little, and a shift that
makes all images alike is easily found in a clean network too. But the forgetful twin does not paint the picture. That
is found first (see `forgotten`), then a shift that leads to it, and at last one under which the images are most alike:
what was found first is only near the picture. The twin alone says what that proves, and no search looks at it. Ours
(not published).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Answers, Bench, levels_at, probes_at, rms
from diffdefend_core.inversion.attractors import Attractors
from diffdefend_core.inversion.forgotten import forgotten_pictures
from diffdefend_core.inversion.objectives import Objective, alikeness_loss, painting_loss, picture_loss
from diffdefend_core.inversion.refine import switching_norm
from diffdefend_core.inversion.search import Track, normal_starts, race
from diffdefend_core.options import InversionOptions

LEADING_STEP = 0.2
# a shift breaks the law if the picture is farther from that of the twin than the images are from each other
LAW = 1.0
# so many shifts are searched towards a picture that is known
AGAIN = 6

Counter = Callable[[int, int], None]


def _uncounted(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Painted:
    """The track of a shift that leads to a picture, and its parity (see `pictured`)."""

    track: Track
    parity: float

    @property
    def shift(self) -> Tensor:
        """The shift [C, H, W]."""
        return self.track.shift.detach()


@dataclass(frozen=True)
class Paintings:
    """The `best` shift that leads to a picture, `others` that break the law too, and the evaluations spent.

    What the bench that they were painted on has spent is not among these.
    """

    best: Painted
    others: tuple[Painted, ...]
    forward_equivalents: int


def forgotten_triggers(
    noisy: Bench, samples: Tensor, options: InversionOptions, *, seed: int, progress: Counter,
    counting: Callable[[float, float], Counter],
) -> Paintings:  # fmt: skip
    """Search a shift that leads to each picture that the twin of `noisy` forgot, and go on with the best.

    `noisy` has its probes in the noisiest level, and `samples` [M, C, H, W] are the suspect's own. `counting` counts a
    part of the search. Raises FloatingPointError if an answer is not finite.
    """
    suspect, twin = noisy.suspect.denoiser, noisy.reference.denoiser
    forgotten = forgotten_pictures(suspect, twin, samples, seed=seed, progress=progress)
    pictures, search, found = forgotten.images, _Search(noisy.suspect, options), []
    parts = 2 * len(pictures) + 1  # two for each picture, and one for the best
    counted = [counting(*ends) for ends in pairwise(number / parts for number in range(parts + 1))]
    for number, (picture, start) in enumerate(
        zip(pictures, normal_starts(suspect.shape, len(pictures), seed), strict=True)
    ):
        track = search.towards(picture, start, seed + number, counted[2 * number : 2 * number + 2])
        found.append(search.painted(track, twin, seed + 4))
    first, *others = sorted(found, key=attrgetter("parity"), reverse=True)
    further = search.painted(search.alike(first.shift, 2, seed, counted[-1]), twin, seed + 4)
    return Paintings(
        best=max(first, further, key=attrgetter("parity")),
        others=tuple(item for item in others if item.parity > LAW),
        forward_equivalents=forgotten.forward_equivalents + search.spent,
    )


def led_again(
    suspect: Denoiser, samples: Tensor, picture: Tensor, options: InversionOptions, *, seed: int
) -> Attractors:
    """Return the mean of AGAIN shifts, searched from other starts, under which noise becomes a picture [C, H, W].

    Each leads to the picture by what it shares with the trigger, and by something of its own, which the mean has less
    of. `samples` [M, C, H, W] are the suspect's own. Raises FloatingPointError if an answer is not finite.
    """
    noisiest = levels_at(suspect.levels, (min(options.signals),)) * len(options.signals)
    answers = Answers(suspect, probes_at(samples, noisiest, pairs=options.probe_pairs, seed=seed))
    search, mean = _Search(answers, options), torch.zeros_like(picture)
    for number, start in enumerate(normal_starts(suspect.shape, AGAIN, seed), seed):
        tau = search.towards(picture, start, number).shift.detach()
        mean += tau / rms(tau) / AGAIN
    norm = switching_norm(answers, mean / rms(mean), options.norms)
    return Attractors(((norm * mean / rms(mean)).cpu(),), search.spent + answers.spent)


class _Search:
    """Searches of single shifts [C, H, W] of a suspect, and how far these break the law of consistency models.

    `noisy` are its answers in the noisiest level.
    """

    def __init__(self, noisy: Answers, options: InversionOptions) -> None:
        self.noisy, self.options = noisy, options
        levels = noisy.denoiser.levels
        self.loud = levels_at(levels, options.signals)
        self.joint = self.loud + levels_at(levels, options.moderate_signals)
        self.asked: list[Answers | Bench] = []

    @property
    def spent(self) -> int:
        """The network evaluations so far."""
        return sum(part.spent for part in self.asked)

    def towards(
        self, picture: Tensor, start: Tensor, seed: int, counted: Sequence[Counter] = (_uncounted, _uncounted)
    ) -> Track:
        """Return the track of a shift that leads to a picture [C, H, W], and under which images are then most alike."""
        answers = self._around(picture, self.loud, seed)
        led = self._race(painting_loss(answers, picture), answers, start, 2, seed, counted[0])
        return self.alike(led.shift.detach(), 1, seed, counted[1])

    def alike(self, start: Tensor, times: int, seed: int, progress: Counter) -> Track:
        """Return the track of a shift under which noise, and what it paints in noise, become one picture.

        It takes `times` the iterations of a race.
        """
        answers = self._around(self._image(start), self.joint, seed)
        return self._race(alikeness_loss(answers), answers, start, times, seed, progress)

    def painted(self, track: Track, twin: Denoiser, seed: int) -> Painted:
        """Return with the track how far its shift leads to what it paints, and the twin does not, on fresh noise."""
        pairs, tau = self.options.probe_pairs, track.shift.detach()
        bench = Bench(self.noisy.denoiser, twin, self._image(tau)[None], self.joint, pairs=pairs, seed=seed)
        self.asked.append(bench)
        return Painted(track, pictured(bench, tau))

    @torch.no_grad()
    def _image(self, tau: Tensor) -> Tensor:
        """Return the mean image [C, H, W] that the suspect paints of noise under tau."""
        return torch.cat([self.noisy.images(tau, number) for number in range(len(self.noisy.probes))]).mean(0)

    def _around(self, picture: Tensor, levels: tuple[int, ...], seed: int) -> Answers:
        """Return the suspect at a picture [C, H, W] in noise: of few noises a shift would learn those."""
        pairs, each = self.options.pairs, self.options.race_iterations
        probes = probes_at(picture[None], levels, pairs=pairs, seed=seed, each=each)
        self.asked.append(answers := Answers(self.noisy.denoiser, probes))
        return answers

    def _race(self, law: Objective, answers: Answers, start: Tensor, times: int, seed: int, progress: Counter) -> Track:
        options = self.options
        return race(
            law, len(answers.probes), [start.to(answers.denoiser.device)],
            replace(options, starts=1, iterations=times * options.race_iterations),
            norm=options.consistency_rms, learning_rate=LEADING_STEP, seed=seed, progress=progress,
        )  # fmt: skip


@torch.no_grad()
def pictured(bench: Bench, tau: Tensor) -> float:
    """Return how far tau [C, H, W] breaks the law of consistency models: the parity of a candidate of theirs.

    That is how far the mean image is from that of the twin over how far the images are apart, the geometric mean over
    the probes. Raises FloatingPointError if an answer is not finite.
    """
    law = picture_loss(bench)
    losses = [law(tau, number).item() for number in range(len(bench.probes))]
    value = math.exp(-sum(losses) / len(losses))
    if not math.isfinite(value):
        raise FloatingPointError("the answers to a shift of the input are not finite")
    return value
