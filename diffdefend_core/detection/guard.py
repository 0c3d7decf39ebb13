"""The input-level guard: does this initial noise carry a trigger? One pass over the numbers, no network.

With a known trigger a `Guard` is made once and called on every noise: a matched filter with a chosen false-positive
rate, or the likelihood ratio of TERD. Without one, `noise_tests` asks whether the noise is N(0, I) at all.

Noise is everywhere in units of the initial noise, so that clean noise is N(0, I): that is the initial state divided by
`levels.initial_scale` (sigma_T for VE models, 1 otherwise). For a latent model noise and trigger are latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffdefend_core.errors import InputError

# up to so many numbers a row the law of the Kolmogorov-Smirnov distance is exact, which takes long for more
EXACT = 10_000


class Guarded(NamedTuple):
    """What a guard says of noise [N, C, H, W]: `scores` [N], and `flags` [N], true where a row carries the trigger."""

    scores: Tensor
    flags: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Guard:
    """A test of noise against one trigger: score = sum_j (q_j x_j + l_j) x_j + c, flagged above `threshold`.

    `linear` is l [D] in float32, D = C * H * W; `quadratic` is q, [C, H, W] or one number [], and None for 0;
    `constant` is c. Made by `Guard.matched` and `Guard.likelihood`. A call costs one dot product a row, with q one
    more pass.
    """

    shape: tuple[int, int, int]
    linear: Tensor
    quadratic: Tensor | None = None
    constant: float = 0.0
    threshold: float

    @classmethod
    def matched(cls, trigger: Tensor, false_positive_rate: float) -> Self:
        """Return the matched filter for a trigger tau [C, H, W], flagged if <x, tau> > ||tau|| z_{1 - rate}.

        The score is <x, tau> / ||tau||: N(0, 1) for clean noise, so that the rate is exact without any data
        (algorithms.md 5.3). The length of tau does not matter, its direction does. Raises InputError for a trigger that
        is zero, not finite or of another form, and for a rate outside (0, 1).
        """
        tau = _trigger(trigger)
        direction = (tau / torch.linalg.vector_norm(tau)).float().flatten()
        return cls(shape=_shape(tau), linear=direction, threshold=-NormalDist().inv_cdf(_rate(false_positive_rate)))

    @classmethod
    def likelihood(cls, trigger: Tensor, gamma: Tensor | float = 1.0, false_positive_rate: float | None = None) -> Self:
        """Return the likelihood ratio log N(x; tau, gamma^2) - log N(x; 0, I), flagged above 0 (TERD, ICML 2024).

        `gamma`, a number or [C, H, W], is the standard deviation of the noise beside the trigger; the published code
        of TERD puts it where the variance belongs. With gamma = 1 the score is <x, tau> - ||tau||^2 / 2, and an exact
        tau misses or flags wrongly with probability Phi(-||tau|| / 2). With a `false_positive_rate` the threshold is
        -log(rate): the mean of the ratio over clean noise is 1, so that by Markov's inequality no more than that share
        of it is flagged, whatever tau and gamma are. Raises InputError as `matched` does, and unless gamma > 0.
        """
        tau = _trigger(trigger)
        deviation = _deviation(gamma, tau)
        precision = 1 / deviation**2
        constant = -(deviation.log() + tau**2 * precision / 2).expand_as(tau).sum().item()
        quadratic = ((1 - precision) / 2).float()
        return cls(
            shape=_shape(tau),
            linear=(tau * precision).float().flatten(),
            quadratic=quadratic if bool(quadratic.any()) else None,
            constant=constant,
            threshold=0.0 if false_positive_rate is None else -math.log(_rate(false_positive_rate)),
        )

    def __call__(self, noise: Tensor) -> Guarded:
        """Return scores [N] and flags [N] of noise [N, C, H, W] of any floating dtype; both on the guard's device.

        Keep the guard where the noise is, with `to`: noise that lies elsewhere is copied. A row whose score is not
        finite is flagged. Raises InputError for noise of another shape.
        """
        if noise.ndim != 4 or noise.shape[1:] != self.shape:
            raise InputError(
                f"noise of shape {tuple(noise.shape)}",
                expected=f"[N, {', '.join(map(str, self.shape))}], the shape of the trigger",
                action="give the guard the trigger of this model, in the space of its noise",
            )
        rows = noise.flatten(1).to(self.linear)
        scores = rows @ self.linear
        if self.quadratic is not None:
            scores = scores + _weighted_squares(rows, self.quadratic)
        scores = scores + self.constant
        clear = (scores <= self.threshold) & (scores > -math.inf)
        return Guarded(scores, ~clear)

    def to(self, device: torch.device | str) -> Self:
        """Return the guard with its tensors on `device`."""
        quadratic = None if self.quadratic is None else self.quadratic.to(device)
        return replace(self, linear=self.linear.to(device), quadratic=quadratic)

    def false_positive_rate(self) -> float:
        """Return the share of clean noise that is flagged. Raises InputError as `expected_miss_rate` does."""
        return _upper_tail((self.threshold - self.constant) / self._length())

    def expected_miss_rate(self, *, norm: float, cosine: float = 1.0, gamma: float = 1.0) -> float:
        """Return the probability that gamma * eps + r is not flagged, for a true trigger r of that norm.

        `cosine` is that between r and the trigger tau of the guard, `gamma` > 0 the scale of the noise beside r. The
        matched filter misses with probability Phi((z - <r, tau> / ||tau||) / gamma), the likelihood ratio at gamma = 1
        with Phi((||tau|| / 2 - <r, tau> / ||tau||) / gamma): for it a tau that is too long loses inputs. Raises
        InputError for a guard with a quadratic part, which has no such form.
        """
        mean = cosine * norm * self._length() + self.constant
        return _upper_tail((mean - self.threshold) / (gamma * self._length()))

    def _length(self) -> float:
        if self.quadratic is not None:
            raise InputError(
                "a likelihood ratio with gamma other than 1",
                expected="a matched filter, or gamma = 1",
                action="measure the rate on drawn noise",
            )
        return float(torch.linalg.vector_norm(self.linear.double()))


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseTests:
    """p-values [N] in float64 of rows of noise under N(0, I), by test; small is suspicious.

    `mean` sees a shift common to all pixels, `norm` a changed energy, `distribution` any other shape of the histogram.
    """

    mean: Tensor
    norm: Tensor
    distribution: Tensor

    @property
    def combined(self) -> Tensor:
        """The p-value [N] of all three by Bonferroni: at most 1, three times the smallest."""
        smallest = torch.stack([self.mean, self.norm, self.distribution]).amin(0)
        return (3 * smallest).clamp(max=1)


def noise_tests(noise: Tensor) -> NoiseTests:
    """Return three p-values for each row of noise [N, C, H, W]: is it N(0, I)? No trigger is needed.

    With D = C * H * W numbers x: sqrt(D) mean(x) is N(0, 1) (two-sided); ||x||^2 is chi-square with D degrees of
    freedom (two-sided); the Kolmogorov-Smirnov distance to N(0, 1) has a known law. They look at histograms only: a
    pattern of zero mean and small energy passes. DisDet tests the input in this way (algorithms.md 2.6). Raises
    InputError for noise of another form or that is not finite. bfloat16 is too coarse for the third test.
    """
    from scipy.stats import chi2  # type: ignore[import-untyped]

    if noise.ndim != 4 or noise.numel() == 0 or not bool(noise.isfinite().all()):
        raise InputError(
            f"noise of shape {tuple(noise.shape)}",
            expected="finite numbers [N, C, H, W]",
            action="give the initial noise as it was drawn",
        )
    rows = noise.flatten(1).double().cpu()
    size = rows.shape[1]
    energy = rows.square().sum(1).numpy()
    two_sided = 2 * torch.from_numpy(chi2.cdf(energy, size)).minimum(torch.from_numpy(chi2.sf(energy, size)))
    return NoiseTests(
        mean=torch.special.erfc(rows.mean(1).abs() * (size / 2) ** 0.5),
        norm=two_sided.clamp(max=1),
        distribution=_kolmogorov_tail(kolmogorov_smirnov(rows), size),
    )


def kolmogorov_smirnov(rows: Tensor) -> Tensor:
    """Return the largest distance [N] between the empirical distribution of rows [N, D] and that of N(0, 1)."""
    size = rows.shape[1]
    normal = torch.special.ndtr(rows.sort(1).values)
    steps = torch.arange(size + 1, dtype=rows.dtype) / size
    distance: Tensor = torch.maximum((steps[1:] - normal).amax(1), (normal - steps[:-1]).amax(1))
    return distance


def _kolmogorov_tail(distance: Tensor, size: int) -> Tensor:
    """Return P(distance or more) [N] for `size` numbers: exact for small sizes, else by the law of infinite ones."""
    from scipy.special import kolmogorov  # type: ignore[import-untyped]
    from scipy.stats import kstwo

    distances = distance.numpy()
    return torch.from_numpy(kstwo.sf(distances, size) if size <= EXACT else kolmogorov(size**0.5 * distances))


def _weighted_squares(rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_j w_j x_j^2 [N] of rows [N, D], for weights [C, H, W] or one number []."""
    squares: Tensor = rows.square() @ weights.flatten() if weights.ndim else weights * torch.linalg.vecdot(rows, rows)
    return squares


def _trigger(trigger: Tensor) -> Tensor:
    """Return the trigger in float64. Raises InputError unless it is [C, H, W], finite and not zero."""
    tau = trigger.detach().double()
    finite = bool(tau.isfinite().all())
    if tau.ndim != 3 or not finite or not bool(tau.any()):
        state = "finite" if finite else "not finite"
        raise InputError(
            f"a trigger of shape {tuple(tau.shape)}, {state if bool(tau.any()) else 'zero everywhere'}",
            expected="finite numbers [C, H, W], not all zero",
            action="give the trigger in units of the initial noise",
        )
    return tau


def _deviation(gamma: Tensor | float, tau: Tensor) -> Tensor:
    """Return gamma in float64, [] if it is constant and as tau otherwise. Raises InputError unless it is > 0."""
    deviation = torch.as_tensor(gamma, dtype=torch.float64, device=tau.device)
    fits = deviation.ndim == 0 or deviation.shape == tau.shape
    if not fits or not bool(((deviation > 0) & deviation.isfinite()).all()):
        raise InputError(
            f"gamma of shape {tuple(deviation.shape)} with least value {deviation.min().item():g}",
            expected=f"a standard deviation above 0, one number or {tuple(tau.shape)}",
            action="give a small number such as 0.01 where there is no noise",
        )
    first = deviation.flatten()[0]
    return first if bool((deviation == first).all()) else deviation


def _rate(rate: float) -> float:
    if not 0 < rate < 1:
        raise InputError(f"false-positive rate {rate}", expected="a share between 0 and 1", action="use 0.001, say")
    return rate


def _shape(tau: Tensor) -> tuple[int, int, int]:
    channels, height, width = tau.shape
    return channels, height, width


def _upper_tail(z: float) -> float:
    """Return 1 - Phi(z), also far out."""
    return math.erfc(z / math.sqrt(2)) / 2
