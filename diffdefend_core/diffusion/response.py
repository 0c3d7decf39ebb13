"""How a denoiser answers to a shift of its input (algorithms.md, sections 0.5 and 5.2).

The mean over antithetic pairs +-eps removes the noise term of the mean answer almost exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels


@dataclass(frozen=True)
class Probe:
    """Inputs at one level: clean rows x0 and noise eps, both [N, C, H, W] (antithetic), and the level index t."""

    x0: Tensor
    eps: Tensor
    t: int


def probe(samples: Tensor, t: int, pairs: int, generator: torch.Generator) -> Probe:
    """Return a probe of 2 * pairs antithetic rows with clean rows drawn from `samples` [M, C, H, W]."""
    x0 = samples[torch.randint(len(samples), (pairs,), generator=generator).to(samples.device)]
    eps = torch.randn(x0.shape, generator=generator).to(samples)
    return Probe(x0=torch.cat([x0, x0]), eps=torch.cat([eps, -eps]), t=t)


def mean_answer(denoiser: Denoiser, at: Probe, shift: Tensor | None) -> Tensor:
    """Return the mean predicted noise [C, H, W] over the rows of a probe; `shift` [C, H, W] is added to x_t as is."""
    t = torch.full((len(at.x0),), at.t, device=at.x0.device)
    x = denoiser.diffuse(at.x0, t, at.eps)
    return denoiser.noise(x if shift is None else x + shift, t).mean(0)


def levels_at(levels: Levels, signals: tuple[float, ...]) -> tuple[int, ...]:
    """Return the level indices whose alpha_t / sigma_t is nearest to each of `signals`, on a log scale.

    Naming levels by their signal-to-noise ratio makes probes comparable across schedules and numbers of steps.
    """
    ratio = (levels.alpha / levels.sigma).log()
    return tuple(int((ratio - torch.tensor(signal, dtype=torch.float64).log()).abs().argmin()) for signal in signals)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square over all elements, a scalar tensor."""
    return x.square().mean().sqrt()


@dataclass(frozen=True)
class Response:
    """The answers of a suspect and a reference to one shift tau [C, H, W], per level (tuples of len(levels)).

    With Delta the shift of the mean answer of the suspect and Delta_ref that of the reference (algorithms.md 5.2):
    `difference` = rms(Delta - Delta_ref) / rms(tau); `gain` = rms(s tau - sigma Delta) / rms(s tau), the share not
    treated as noise; `slope` is lambda, the least-squares scale of Delta along tau; `x0_slope` = sigma (lambda_ref -
    lambda) / alpha, the shift of the predicted x0 along tau beyond the reference's. `untreated` [C, H, W] is the mean
    of s tau - sigma Delta over the levels, in units of the initial noise. `baseline` is rms(answer - answer_ref)
    without any shift. `violation` = (sigma lambda - s) / alpha: E[x0 | x_t] is the gradient of a convex function, so
    that x0 never moves against a shift of x_t; this is how far it does (positive: it does).
    """

    difference: tuple[float, ...]
    gain: tuple[float, ...]
    slope: tuple[float, ...]
    x0_slope: tuple[float, ...]
    violation: tuple[float, ...]
    baseline: tuple[float, ...]
    untreated: Tensor


class Bench:
    """Probes at some levels, with the answers of a suspect and a reference to them computed once.

    `each` probes of `pairs` antithetic pairs at every level. `spent` counts the network evaluations of single samples
    so far: forward 1, forward and backward 3.
    """

    def __init__(
        self,
        suspect: Denoiser,
        reference: Denoiser,
        samples: Tensor,
        levels: tuple[int, ...],
        *,
        pairs: int,
        seed: int,
        each: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.suspect, self.reference = suspect, reference
        self.probes = [probe(samples, t, pairs, generator) for t in levels for _ in range(each)]
        with torch.no_grad():
            self.plain = [(mean_answer(suspect, at, None), mean_answer(reference, at, None)) for at in self.probes]
        self.spent = 2 * sum(len(at.x0) for at in self.probes)

    def shifts(self, tau: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return Delta and Delta_ref [C, H, W] at probe `number`: how both mean answers move under s_t * tau."""
        at, (plain, plain_reference) = self.probes[number], self.plain[number]
        shift = self.suspect.levels.carried[at.t].item() * tau
        self.spent += 2 * len(at.x0) * (3 if tau.requires_grad else 1)
        return mean_answer(self.suspect, at, shift) - plain, mean_answer(self.reference, at, shift) - plain_reference

    @torch.no_grad()
    def respond(self, tau: Tensor) -> Response:
        """Return the response to the shift s_t * tau. Raises FloatingPointError if an answer is not finite."""
        levels = self.suspect.levels
        names = ("difference", "gain", "slope", "x0_slope", "violation", "baseline")
        columns: dict[str, list[float]] = {name: [] for name in names}
        untreated = torch.zeros_like(tau)
        for number, at in enumerate(self.probes):
            alpha, sigma, carried = (curve[at.t].item() for curve in (levels.alpha, levels.sigma, levels.carried))
            delta, delta_reference = self.shifts(tau, number)
            rest = carried * tau - sigma * delta
            slope, slope_reference = _slope(delta, tau), _slope(delta_reference, tau)
            columns["difference"].append((rms(delta - delta_reference) / rms(tau)).item())
            columns["gain"].append((rms(rest) / rms(carried * tau)).item())
            columns["slope"].append(slope)
            columns["x0_slope"].append(sigma * (slope_reference - slope) / alpha)
            columns["violation"].append((sigma * slope - carried) / alpha)
            columns["baseline"].append(rms(self.plain[number][0] - self.plain[number][1]).item())
            untreated += rest / (levels.initial_scale * len(self.probes))
        if not math.isfinite(sum(columns["baseline"]) + untreated.sum().item()):
            raise FloatingPointError("the answers to a shift of the input are not finite")
        return Response(untreated=untreated, **{name: tuple(values) for name, values in columns.items()})


def respond(
    suspect: Denoiser, reference: Denoiser, tau: Tensor, samples: Tensor, levels: tuple[int, ...], pairs: int, seed: int
) -> Response:
    """Measure the response to one shift s_t * tau on fresh noise; see `Bench`."""
    return Bench(suspect, reference, samples, levels, pairs=pairs, seed=seed).respond(tau)


def _slope(delta: Tensor, tau: Tensor) -> float:
    return ((delta * tau).sum() / tau.square().sum()).item()
