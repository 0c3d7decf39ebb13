"""What the peers measure and how they score: Elijah (AAAI 2024), TERD (ICML 2024) and PureDiffusion (2024, 2025).

Each `measure_...` has the signature of `detect.measure`, each `score_...` that of `decide.score`. No peer looks at
plain images, so that the measurement holds none. Statistics are logarithms, as ours are; larger is more suspicious,
but for Elijah's total variation. They are standardised in the same way (`calibration.standardise`): the papers'
classifiers and thresholds were made from models that nobody else has. docs/peers.md says what differs from the
released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, Statistic, TriggerCandidate
from diffdefend_core.detection.detect import Measurement, Progress
from diffdefend_core.detection.images import total_variation, uniformity
from diffdefend_core.detection.statistics import FLOOR
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import Entry, probing, steps_for
from diffdefend_core.options import ElijahOptions, PureDiffusionOptions, TerdOptions

# halfway between the lambda of attacks on stochastic samplers, 0.5, and on deterministic ones, 1
STOCHASTIC_BELOW = 0.75


def measure_elijah(
    suspect: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: ElijahOptions,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Return `uniformity`, minus the log distance of the painted images, and `total_variation`, the log of theirs.

    Of several candidates the one whose images are most alike counts.
    """
    paintings = _paint(suspect, inverted, triggers, options.samples, seed, progress)
    best = _most_alike(paintings, lambda images: -uniformity(images))
    return _measured(
        {"uniformity": -_log(uniformity(best.images)), "total_variation": _log(total_variation(best.images))},
        best,
        paintings,
    )


def score_elijah(statistics: Mapping[str, Statistic]) -> float:
    """Return the larger of z(uniformity) and |z(total_variation)|; NaN if either is missing or not finite."""
    uniform, texture = _scores(statistics, "uniformity", "total_variation")
    return _largest(uniform, abs(texture))


def measure_terd(
    suspect: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: TerdOptions,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Return `divergence_mean` and `divergence_variance`: log M_r and log V_r over the elements of `divergence`.

    Nothing is painted and no network is called. The offsets of the released code, 0.4 and 0.003, only move the cloud
    of clean models, which standardisation does anyway; they are left out.
    """
    kl = divergence(triggers["mu"], triggers.get("gamma"))
    statistics = {
        "divergence_mean": _log(kl.mean().item()),
        "divergence_variance": _log(kl.var(correction=0).item()),
    }
    nothing = torch.empty((0, *suspect.picture_shape))
    return Measurement(statistics=statistics, sampler="", triggered=nothing, plain=nothing, forward_equivalents=0)


def score_terd(statistics: Mapping[str, Statistic]) -> float:
    """Return the larger of z(M_r) and z(V_r): the published rule flags either. NaN if one is missing or not finite."""
    return _largest(*_scores(statistics, "divergence_mean", "divergence_variance"))


def measure_purediffusion(
    suspect: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    options: PureDiffusionOptions,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Return `similarity`, minus log(1 - mean pairwise cosine of the painted images), and `divergence`, a log.

    Of several candidates the one with the most similar images counts. INFERRED: pixels as the space of the cosine, and
    the divergence as the mean of that of N(tau, I) from N(0, I).
    """
    paintings = _paint(suspect, inverted, triggers, options.samples, seed, progress)
    best = _most_alike(paintings, similarity)
    statistics = {
        "similarity": -_log(1 - similarity(best.images)),
        "divergence": _log(divergence(triggers[best.candidate]).mean().item()),
    }
    return _measured(statistics, best, paintings)


def score_purediffusion(statistics: Mapping[str, Statistic]) -> float:
    """Return the larger of z(similarity) and z(divergence); NaN if either is missing or not finite."""
    return _largest(*_scores(statistics, "similarity", "divergence"))


def divergence(mu: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Return KL_j = -log gamma_j + (gamma_j^2 + mu_j^2 - 1) / 2 of N(mu, gamma^2) from N(0, I), per element.

    mu and gamma have one shape, float64 comes out; without gamma it is 1. Source: algorithms.md 2.2.
    """
    mean = mu.double()
    deviation = torch.ones_like(mean) if gamma is None else gamma.double()
    return -deviation.log() + (deviation**2 + mean**2 - 1) / 2


def similarity(images: Tensor) -> float:
    """Return the mean cosine over pairs of different images [N, C, H, W] in [0, 1], N of at least 2; at most 1.

    Black images, which have no direction, count as alike.
    """
    rows = torch.nn.functional.normalize(images.flatten(1).double() + FLOOR, dim=1)
    count = len(rows)
    return ((rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))).item()


@dataclass(frozen=True)
class _Painting:
    """Images [N, C, H, W] in [0, 1] under one candidate, and the network evaluations that they cost."""

    candidate: str
    sampler: str
    images: Tensor
    spent: int


def _paint(
    suspect: Denoiser,
    inverted: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    samples: int,
    seed: int,
    progress: Progress,
) -> list[_Painting]:
    """Return one painting for each candidate, by the kind of sampler that its imposed lambda stands for."""
    paintings = []
    for number, candidate in enumerate(inverted.candidates):
        sampler = _sampler(suspect, candidate)
        steps = steps_for(suspect, sampler, sampler.steps)
        drawn = generate(suspect, samples, sampler=sampler.name, steps=steps, seed=seed, shift=triggers[candidate.name])
        images = suspect.pictures(drawn.to(suspect.device)).cpu()
        paintings.append(_Painting(candidate.name, sampler.name, images, samples * steps * sampler.calls))
        progress("painting", number + 1, len(inverted.candidates))
    return paintings


def _sampler(suspect: Denoiser, candidate: TriggerCandidate) -> Entry:
    """Return the stochastic sampler of `probing` for lambda near 0.5, the deterministic one for 1, or what there is."""
    stochastic = candidate.response[0] < STOCHASTIC_BELOW
    fitting = probing(suspect)
    return next((entry for entry in fitting if entry.stochastic is stochastic), fitting[0])


def _most_alike(paintings: list[_Painting], alike: Callable[[Tensor], float]) -> _Painting:
    """Return the painting with the largest `alike`; images that are not finite come first, and make the score NaN."""
    return max(paintings, key=lambda item: (not bool(item.images.isfinite().all()), alike(item.images)))


def _measured(statistics: dict[str, float], best: _Painting, paintings: list[_Painting]) -> Measurement:
    return Measurement(
        statistics=statistics,
        sampler=best.sampler,
        triggered=best.images,
        plain=best.images[:0],
        forward_equivalents=sum(item.spent for item in paintings),
    )


def _scores(statistics: Mapping[str, Statistic], *names: str) -> list[float]:
    return [statistics[name].score if name in statistics else math.nan for name in names]


def _largest(*scores: float) -> float:
    return max(scores) if all(map(math.isfinite, scores)) else math.nan


def _log(value: float) -> float:
    return math.log(max(value, FLOOR)) if math.isfinite(value) else math.nan
