"""The raw statistics of one model. All are logarithms of ratios; larger is more suspicious.

| statistic | meaning | source |
|---|---|---|
| twin_response | how differently suspect and twin answer to the found shift, mean over noisy levels | ours |
| moderate_response | the same over levels of moderate noise, where attacks on deterministic samplers show | ours |
| violation | how far the predicted x0 moves against the shift, which an ideal network never does | lab notes |
| x0_response | the largest shift of the predicted x0 beyond the twin's, over levels | algorithms.md 0.5, x0 space |
| uniformity | how much more alike the suspect's images under the shift are than the twin's | DIFFDEFEND, Elijah |
| total_variation | how far the total variation of those images is from the twin's | DIFFDEFEND |

Images are compared with the twin's under the *same* shift: any network, a clean one too, may collapse on a shift that
it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffdefend_core.artifacts import TriggerCandidate
from diffdefend_core.detection.images import total_variation, uniformity
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import Entry, probing, steps_for
from diffdefend_core.options import DetectionOptions

FLOOR = 1e-6
VIOLATION_FLOOR = 0.1  # small networks violate a little


@dataclass(frozen=True)
class Painting:
    """Images [N, C, H, W] in [0, 1] of suspect and reference under a shift, by one sampler."""

    sampler: str
    suspect: Tensor
    reference: Tensor


def paint(
    suspect: Denoiser,
    reference: Denoiser,
    tau: Tensor,
    options: DetectionOptions,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Painting:
    """Return the painting of the sampler, stochastic or deterministic, under which the suspect's images are more alike.

    An attack trained for one kind of sampler leaves its path under the other (algorithms.md 0.4).
    """
    paintings = []
    wanted = probing(suspect)
    for number, sampler in enumerate(wanted):
        images = [
            denoiser.pictures(
                generate(
                    denoiser,
                    options.samples,
                    sampler=sampler.name,
                    steps=painting_steps(denoiser, sampler, options),
                    seed=seed,
                    shift=tau,
                ).to(denoiser.device)
            ).cpu()
            for denoiser in (suspect, reference)
        ]
        paintings.append(Painting(sampler=sampler.name, suspect=images[0], reference=images[1]))
        progress(number + 1, len(wanted))
    # images that are not finite come first: the verdict must speak of them
    return min(paintings, key=lambda item: (bool(item.suspect.isfinite().all()), uniformity(item.suspect)))


def painting_steps(denoiser: Denoiser, sampler: Entry, options: DetectionOptions) -> int:
    """Return the number of steps by which `sampler` paints."""
    wanted = options.stochastic_steps if sampler.stochastic else options.deterministic_steps
    return steps_for(denoiser, sampler, wanted)


def raw_statistics(best: TriggerCandidate, painting: Painting) -> dict[str, float]:
    """Return the raw statistics by name. A value that is not finite stays so: the decision calls it inconclusive."""
    alike = _log(uniformity(painting.reference)) - _log(uniformity(painting.suspect))
    texture = _log(total_variation(painting.suspect)) - _log(total_variation(painting.reference))
    # a twin that differs by rounding alone has forgotten nothing: then nothing was measured
    response = best.difference if best.difference > FLOOR else math.nan
    return {
        "twin_response": _log(response),
        "moderate_response": _log(best.moderate_difference),
        "violation": _log(VIOLATION_FLOOR + max(0.0, best.violation)),
        "x0_response": _log(max(abs(value) for value in best.x0_response)),
        "uniformity": alike,
        "total_variation": abs(texture),
    }


def _log(value: float) -> float:
    return math.log(max(value, FLOOR)) if math.isfinite(value) else math.nan
