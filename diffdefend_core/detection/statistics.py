"""The raw statistics of one model. All are logarithms of ratios; larger is more suspicious.

| statistic | meaning | source |
|---|---|---|
| parity | how evenly suspect, but not its twin, answers to a found shift and its opposite, at noisy levels; or how \
far both are apart there in quieter noise without a shift; of a consistency model how clearly it paints one picture \
that its twin does not | ours |
| contrast | the parity of the found shift over that of shifts that are no trigger | ours |
| violation | how far the predicted x0 moves against the shift, which an ideal network never does | lab notes |
| content | how far the predicted x0 moves evenly at moderate noise: the painted picture shows | algorithms.md 5.2 |
| uniformity | how much more alike the images under the shift are than under its opposite, and than plain ones | \
DIFFDEFEND, Elijah |
| total_variation | how far the total variation of those images is from that under the opposite shift | DIFFDEFEND |

Images are compared with those under the *opposite* shift: any network, a clean one too, may collapse on a shift that
it never saw, but then it does so on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.detection.images import total_variation, uniformity
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import Entry, probing, steps_for, usual
from diffdefend_core.options import DetectionOptions

FLOOR = 1e-6
ALIKE = 0.02  # images closer than this, in [0, 1], are one picture
CONTROL_FLOOR = 0.02  # an even response below this says nothing
EVEN = ("parity", "quiet")  # the candidates for parity
VIOLATION_FLOOR = 0.06  # networks that are not ideal violate a little


@dataclass(frozen=True)
class Painting:
    """Images [N, C, H, W] in [0, 1] under a candidate at one rms and under its opposite, by one sampler."""

    candidate: str
    sampler: str
    rms: float
    triggered: Tensor
    opposite: Tensor

    @property
    def collapse(self) -> float:
        """How much more alike the images under the candidate are: a logarithm of a ratio of uniformities."""
        return _log(_spread(self.opposite)) - _log(_spread(self.triggered))


def paint(
    suspect: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: DetectionOptions,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Painting]:
    """Return one painting for each candidate and sampler that suits it, at the rms where its images are most alike.

    An attack trained for one kind of sampler leaves its path under the other (algorithms.md 0.4). A candidate that
    was found by its violation of monotonicity belongs to a deterministic sampler.
    """
    wanted = _wanted(suspect, inverted)
    paintings = []
    for number, (candidate, entry) in enumerate(wanted):
        direction = triggers[candidate.name] / triggers[candidate.name].square().mean().sqrt().clamp(min=1e-12)
        images = {rms: _images(suspect, rms * direction, entry, options, seed) for rms in options.rms}
        # images that are not finite come first: the verdict must speak of them
        best = min(images, key=lambda rms: (bool(images[rms].isfinite().all()), uniformity(images[rms])))
        opposite = _images(suspect, -best * direction, entry, options, seed)
        paintings.append(Painting(candidate.name, entry.name, best, images[best], opposite))
        progress(number + 1, len(wanted))
    return paintings


def painting_cost(suspect: Denoiser, inverted: InvertedTrigger, options: DetectionOptions) -> int:
    """Return the model evaluations of `paint`."""
    steps = sum(entry.calls * painting_steps(suspect, entry, options) for _, entry in _wanted(suspect, inverted))
    return options.samples * (len(options.rms) + 1) * steps


def _wanted(suspect: Denoiser, inverted: InvertedTrigger) -> list[tuple[TriggerCandidate, Entry]]:
    """Return what is painted: of the candidates for parity only the one that stands out more."""
    even, against = _of_each_law(inverted)
    return [(item, entry) for item in (max(even, key=contrast), against) for entry in suitable(suspect, item)]


def _of_each_law(inverted: InvertedTrigger) -> tuple[list[TriggerCandidate], TriggerCandidate]:
    """Return the candidates for parity, and the one for monotonicity; a consistency model has none in quiet noise."""
    found = {item.name: item for item in inverted.candidates}
    return [found[name] for name in EVEN if name in found], found["monotonicity"]


def contrast(candidate: TriggerCandidate) -> float:
    """Return the logarithm of a candidate's parity over that of shifts that are no trigger."""
    return _log(candidate.parity) - _log(_largest(CONTROL_FLOOR, candidate.control))


def suitable(suspect: Denoiser, candidate: TriggerCandidate) -> list[Entry]:
    """Return the samplers by which a candidate is painted: one of each kind, which are good with few steps."""
    plain = usual(suspect)
    both = [plain if plain.stochastic is entry.stochastic else entry for entry in probing(suspect)]
    return [entry for entry in both if not entry.stochastic] or both if candidate.name == "monotonicity" else both


def painting_steps(denoiser: Denoiser, sampler: Entry, options: DetectionOptions) -> int:
    """Return the number of steps by which `sampler` paints: fewer, where a step calls the network more than once."""
    wanted = options.stochastic_steps if sampler.stochastic else options.deterministic_steps
    return steps_for(denoiser, sampler, max(1, wanted // sampler.calls))


def raw_statistics(inverted: InvertedTrigger, painting: Painting, plain: Tensor) -> dict[str, float]:
    """Return the raw statistics by name; `plain` are images [N, C, H, W] in [0, 1] without a shift.

    A value that is not finite stays so: the decision calls it inconclusive.
    """
    even, against = _of_each_law(inverted)
    alike = -_largest(-painting.collapse, _log(_spread(painting.triggered)) - _log(_spread(plain)))
    texture = _log(total_variation(painting.triggered)) - _log(total_variation(painting.opposite))
    # answers that are even by rounding alone, or exactly those of the twin, say nothing: nothing was measured
    parity = _largest(*(item.parity for item in even))
    return {
        "parity": _log(parity if parity > FLOOR else math.nan),
        "contrast": _largest(*map(contrast, even)),
        "violation": _log(_largest(VIOLATION_FLOOR, against.violation)),
        "content": _log(_largest(*(item.content for item in (*even, against)))),
        "uniformity": alike,
        "total_variation": abs(texture),
    }


def _images(suspect: Denoiser, tau: Tensor, entry: Entry, options: DetectionOptions, seed: int) -> Tensor:
    samples = generate(
        suspect,
        options.samples,
        sampler=entry.name,
        steps=painting_steps(suspect, entry, options),
        seed=seed,
        shift=tau,
    )
    return suspect.pictures(samples.to(suspect.device)).cpu()


def _spread(images: Tensor) -> float:
    value = uniformity(images)
    return max(value, ALIKE) if math.isfinite(value) else value


def _largest(*values: float) -> float:
    """Return the largest value; NaN if any is not finite, which `max` may hide."""
    return max(values) if all(map(math.isfinite, values)) else math.nan


def _log(value: float) -> float:
    return math.log(max(value, FLOOR)) if math.isfinite(value) else math.nan
