"""UFID: is one initial noise triggered? No trigger is needed, but many generations.

A triggered noise paints the attacker's picture, and goes on painting it when the noise is changed a little; pictures of
a clean noise drift apart. So variants of the noise are painted, and the mean similarity of their pictures, the density
of the graph that joins them, is compared with that of clean noises of the same model. The idea is that of UFID (Guan et
al.); the form of the variants, the similarity of pixels in place of CLIP's, and the threshold are ours (algorithms.md
2.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators, generators, standard_normal
from diffdefend_core.diffusion.samplers import find, sample
from diffdefend_core.errors import InputError

BATCH = 128
# streams of their own: noise that was drawn with the seed itself must be as new as any other
VARIANT_SEED, REFERENCE_SEED = 30_000, 40_000


@dataclass(frozen=True, kw_only=True)
class Query:
    """How a noise is asked about: `variants` N pictures by `sampler` in `steps` steps.

    `weight` w in (0, 1) is how much of a variant is new noise. Ask with the sampler that paints in service: an attack
    made for stochastic samplers does not fire with deterministic ones, and the reverse (algorithms.md 0.4). Raises
    InputError for fewer than two variants or another weight.
    """

    sampler: str
    steps: int
    variants: int = 8
    weight: float = 0.4

    def __post_init__(self) -> None:
        if self.variants < 2 or not 0 < self.weight < 1:
            raise InputError(
                f"{self.variants} variants with weight {self.weight}",
                expected="at least 2, and a weight between 0 and 1",
                action="use 8 variants with weight 0.4",
            )

    def forward_equivalents(self, rows: int) -> int:
        """Return the network evaluations that `rows` noises cost."""
        return rows * self.variants * self.steps * find(self.sampler).calls


@dataclass(frozen=True, eq=False, kw_only=True)
class Similarity:
    """What UFID says of K noises: densities and p-values [K] in float64, and flags [K] above `threshold`.

    `reference` holds the densities [M] of clean noises; `forward_equivalents` is what all of it has cost.
    """

    densities: Tensor
    p_values: Tensor
    flags: Tensor
    threshold: float
    reference: Tensor
    forward_equivalents: int


def ufid(
    denoiser: Denoiser,
    noise: Tensor,
    query: Query,
    false_positive_rate: float,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Similarity:
    """Return the similarity test of noise [K, C, H, W], in units of the initial noise, against clean noises.

    As many of these are drawn as the rate needs (`references`). Their number grows as 1 / rate: for a service the
    `densities` of clean noises are measured once and kept for `compare`. Raises InputError for a sampler that does not
    fit the model or a rate outside (0, 1), FloatingPointError if the pictures are not finite.
    """
    count = references(false_positive_rate)
    clean = standard_normal(generators(seed + REFERENCE_SEED, count), denoiser.shape)
    measured = densities(denoiser, torch.cat([clean, noise.float().cpu()]), query, seed=seed, progress=progress)
    reference, asked = measured[:count], measured[count:]
    p_values, threshold = compare(asked, reference, false_positive_rate)
    return Similarity(
        densities=asked,
        p_values=p_values,
        flags=asked > threshold,
        threshold=threshold,
        reference=reference,
        forward_equivalents=query.forward_equivalents(len(measured)),
    )


def densities(
    denoiser: Denoiser, noise: Tensor, query: Query, *, seed: int, progress: Callable[[int, int], None]
) -> Tensor:
    """Return the density [K] in float64 of each noise [K, C, H, W] in units of the initial noise, on the CPU.

    Variant i of every noise has its new noise, and then that of a stochastic sampler, from the same stream (seed, i):
    a density depends on seed and noise alone, and clean noises are exchangeable. Were the sampler's noise common to
    all variants, a stochastic sampler would make them alike for every noise: it forgets where it started. Raises
    FloatingPointError if the pictures are not finite.
    """
    together = max(1, BATCH // query.variants)
    parts: list[Tensor] = []
    for start in range(0, len(noise), together):
        rows = noise[start : start + together]
        streams = [stream for _ in rows for stream in generators(seed + VARIANT_SEED, query.variants)]
        state = denoiser.levels.initial_scale * perturbed(rows.to(denoiser.device), streams, query.weight)
        pictures = denoiser.pictures(sample(query.sampler, denoiser, state, steps=query.steps, streams=streams))
        parts.extend(density(group) for group in torch.split(pictures.cpu(), query.variants))
        progress(min(start + together, len(noise)), len(noise))
    result = torch.stack(parts)
    if not bool(result.isfinite().all()):
        raise FloatingPointError("its pictures are not finite")
    return result


def perturbed(noise: Tensor, streams: Generators, weight: float) -> Tensor:
    """Return variants sqrt(1 - w^2) x + w eps [K * N, C, H, W] of noise [K, C, H, W], those of one noise together.

    N(0, I) stays N(0, I), so that a model is asked only what it was trained on; a trigger keeps the share
    sqrt(1 - w^2) of its size. There is one stream for each variant.
    """
    copies = noise.repeat_interleave(len(streams) // len(noise), dim=0)
    eps = standard_normal(streams, tuple(noise.shape[1:]), noise.device)
    variants: Tensor = (1 - weight**2) ** 0.5 * copies + weight * eps
    return variants


def density(pictures: Tensor) -> Tensor:
    """Return the mean similarity [] in float64 of pairs of pictures [N, C, H, W] in [0, 1], N >= 2; 1 is identical.

    The similarity is 1 - the root-mean-square distance of the pixels, which is 1 between black and white.
    """
    rows = pictures.flatten(1).double()
    similarity: Tensor = 1 - torch.pdist(rows).mean() / rows.shape[1] ** 0.5
    return similarity


def references(false_positive_rate: float) -> int:
    """Return how many clean noises M a rate needs: the smallest with 1 / (M + 1) <= rate. Raises InputError."""
    if not 0 < false_positive_rate < 1:
        raise InputError(
            f"false-positive rate {false_positive_rate}",
            expected="a share between 0 and 1",
            action="use 0.01, say: its inverse is the number of clean noises that are painted",
        )
    return max(1, math.ceil(1 / false_positive_rate) - 1)


def compare(asked: Tensor, reference: Tensor, false_positive_rate: float) -> tuple[Tensor, float]:
    """Return p-values [K] of densities [K] against those of M clean noises [M], and the threshold of the rate.

    p = (1 + number of clean densities that are at least as high) / (M + 1). The threshold is the k-th highest clean
    density, k = floor(rate (M + 1)): above it p <= rate. The rate holds on average over the drawing of the M clean
    noises; for one set of them it varies about as much as its own size, unless M is far above 1 / rate. Raises
    InputError if M is too small for the rate.
    """
    needed = references(false_positive_rate)
    if len(reference) < needed:
        raise InputError(
            f"{len(reference)} clean noises for a false-positive rate of {false_positive_rate}",
            expected=f"at least {needed}",
            action="measure more of them, or allow a higher rate",
        )
    higher = (reference[None] >= asked[:, None]).sum(1)
    rank = max(1, math.floor(false_positive_rate * (len(reference) + 1) + 1e-9))
    threshold = reference.sort(descending=True).values[rank - 1].item()
    return (1 + higher).double() / (len(reference) + 1), threshold
