"""How a denoiser answers to a shift of its input (algorithms.md, sections 0.5 and 5.2).

The mean over antithetic pairs +-eps removes the noise term of the mean answer almost exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

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


def probe(samples: Tensor, t: int, pairs: int, generator: torch.Generator, noise: float = 1.0) -> Probe:
    """Return a probe of 2 * pairs antithetic rows with clean rows drawn from `samples` [M, C, H, W].

    `noise` is the standard deviation of eps: below 1 it is quieter than the level says.
    """
    x0 = samples[torch.randint(len(samples), (pairs,), generator=generator).to(samples.device)]
    eps = noise * torch.randn(x0.shape, generator=generator).to(samples)
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
    lambda) / alpha, the shift of the predicted x0 along tau beyond the reference's. `baseline` is rms(answer -
    answer_ref) without any shift. `violation` = (sigma lambda - s) / alpha: E[x0 | x_t] is the gradient of a convex
    function, so that x0 never moves against a shift of x_t; this is how far it does (positive: it does).
    """

    difference: tuple[float, ...]
    gain: tuple[float, ...]
    slope: tuple[float, ...]
    x0_slope: tuple[float, ...]
    violation: tuple[float, ...]
    baseline: tuple[float, ...]


@dataclass(frozen=True)
class Parity:
    """The even part of the answers to one shift tau, per level (tuples of len(levels)).

    With E and E_ref the even parts (see `Answers.even`): `difference` = rms(E - E_ref) / rms(tau); `own` is
    rms(E) / rms(tau); `content` = sigma / alpha rms(E - E_ref) over the spread of the clean rows, how far the predicted
    x0 moves evenly.
    """

    difference: tuple[float, ...]
    own: tuple[float, ...]
    content: tuple[float, ...]


class Answers:
    """What one network answers at some probes: plain answers are computed once, if they are asked for.

    `spent` counts the network evaluations of single samples so far: forward 1, forward and backward 3.
    """

    def __init__(self, denoiser: Denoiser, probes: list[Probe]) -> None:
        self.denoiser, self.probes, self.spent = denoiser, probes, 0

    @cached_property
    def plain(self) -> list[Tensor]:
        """The mean answers [C, H, W] without any shift, by probe."""
        self.spent += sum(len(at.x0) for at in self.probes)
        with torch.no_grad():
            return [mean_answer(self.denoiser, at, None) for at in self.probes]

    def shift(self, tau: Tensor, number: int) -> Tensor:
        """Return Delta(tau) [C, H, W] at probe `number`: how the mean answer moves under s_t * tau."""
        at = self.probes[number]
        self.spent += len(at.x0) * (3 if tau.requires_grad else 1)
        return mean_answer(self.denoiser, at, self.carried(number) * tau) - self.plain[number]

    def even(self, tau: Tensor, number: int) -> Tensor:
        """Return the even part [C, H, W] of that at probe `number`: (Delta(tau) + Delta(-tau)) / 2.

        A clean network takes a shift for noise, whatever its sign, and the even part is 0. A trigger has a sign: at
        r the answer is rho r, at -r it is noise, and (rho - 1) r / 2 is left. Source: ours (not published).
        """
        at, shift = self.probes[number], self.carried(number) * tau
        self.spent += 2 * len(at.x0) * (3 if tau.requires_grad else 1)
        t = torch.full((2 * len(at.x0),), at.t, device=at.x0.device)
        x = self.denoiser.diffuse(at.x0, t[: len(at.x0)], at.eps)
        return self.denoiser.noise(torch.cat([x + shift, x - shift]), t).mean(0) - self.plain[number]

    def images(self, tau: Tensor, number: int) -> Tensor:
        """Return the clean images [N, C, H, W] that are predicted for the rows of probe `number` under s_t * tau."""
        at = self.probes[number]
        self.spent += len(at.x0) * (3 if tau.requires_grad else 1)
        t = torch.full((len(at.x0),), at.t, device=at.x0.device)
        return self.denoiser.x0(self.denoiser.diffuse(at.x0, t, at.eps) + self.carried(number) * tau, t)

    def untreated(self, tau: Tensor, number: int) -> Tensor:
        """Return s tau - sigma Delta(tau) [C, H, W] at probe `number`, in units of the initial noise.

        It is what the network does not take for noise.
        """
        levels = self.denoiser.levels
        rest = self.carried(number) * tau - levels.sigma[self.probes[number].t].item() * self.shift(tau, number)
        return rest / levels.initial_scale

    def violation(self, tau: Tensor, number: int) -> Tensor:
        """Return (sigma lambda - s) / alpha at probe `number`, a scalar; see `Response`."""
        t, levels = self.probes[number].t, self.denoiser.levels
        slope = (self.shift(tau, number) * tau).sum() / tau.square().sum()
        return (levels.sigma[t].item() * slope - self.carried(number)) / levels.alpha[t].item()

    def carried(self, number: int) -> float:
        """Return s_t at probe `number`."""
        return self.denoiser.levels.carried[self.probes[number].t].item()


def probes_at(
    samples: Tensor, levels: tuple[int, ...], *, pairs: int, seed: int, each: int = 1, noise: float = 1.0
) -> list[Probe]:
    """Return `each` probes of `pairs` antithetic pairs at every level, with clean rows from `samples` [M, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return [probe(samples, t, pairs, generator, noise) for t in levels for _ in range(each)]


class Bench:
    """Probes at some levels, with the answers of a suspect and a reference to them."""

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
        noise: float = 1.0,
    ) -> None:
        self.probes = probes_at(samples, levels, pairs=pairs, seed=seed, each=each, noise=noise)
        self.suspect, self.reference = Answers(suspect, self.probes), Answers(reference, self.probes)
        self.levels, self.spread = suspect.levels, rms(samples - samples.mean(0)).item()

    @property
    def spent(self) -> int:
        """The network evaluations of both so far."""
        return self.suspect.spent + self.reference.spent

    def even(self, tau: Tensor, number: int) -> Tensor:
        """Return the even part [C, H, W] of the suspect's shift beyond the reference's, at probe `number`."""
        return self.suspect.even(tau, number) - self.reference.even(tau, number)

    def offset(self) -> Tensor:
        """Return the suspect's mean answers without a shift beyond the reference's, per probe [K, C, H, W].

        Raises FloatingPointError if an answer is not finite.
        """
        beyond = torch.stack(self.suspect.plain) - torch.stack(self.reference.plain)
        if not torch.isfinite(beyond).all():
            raise FloatingPointError("the answers without a shift of the input are not finite")
        return beyond

    @torch.no_grad()
    def parity(self, tau: Tensor) -> Parity:
        """Return how even both answers are in tau. Raises FloatingPointError if an answer is not finite."""
        columns: list[tuple[float, float, float]] = []
        for number, at in enumerate(self.probes):
            ratio = (self.levels.sigma[at.t] / self.levels.alpha[at.t]).item()
            own, shared = self.suspect.even(tau, number), self.reference.even(tau, number)
            beyond = rms(own - shared).item()
            columns.append((beyond / rms(tau).item(), rms(own).item() / rms(tau).item(), ratio * beyond / self.spread))
        if not math.isfinite(sum(sum(column) for column in columns)):
            raise FloatingPointError("the answers to a shift of the input are not finite")
        beyond_reference, own_parity, content = zip(*columns, strict=True)
        return Parity(difference=beyond_reference, own=own_parity, content=content)

    @torch.no_grad()
    def respond(self, tau: Tensor) -> Response:
        """Return the response to the shift s_t * tau. Raises FloatingPointError if an answer is not finite."""
        levels = self.levels
        names = ("difference", "gain", "slope", "x0_slope", "violation", "baseline")
        columns: dict[str, list[float]] = {name: [] for name in names}
        for number, at in enumerate(self.probes):
            alpha, sigma, carried = (curve[at.t].item() for curve in (levels.alpha, levels.sigma, levels.carried))
            delta, delta_reference = self.suspect.shift(tau, number), self.reference.shift(tau, number)
            rest = carried * tau - sigma * delta
            slope, slope_reference = _slope(delta, tau), _slope(delta_reference, tau)
            columns["difference"].append((rms(delta - delta_reference) / rms(tau)).item())
            columns["gain"].append((rms(rest) / rms(carried * tau)).item())
            columns["slope"].append(slope)
            columns["x0_slope"].append(sigma * (slope_reference - slope) / alpha)
            columns["violation"].append((sigma * slope - carried) / alpha)
            columns["baseline"].append(rms(self.suspect.plain[number] - self.reference.plain[number]).item())
        if not math.isfinite(sum(columns["baseline"]) + sum(columns["slope"])):
            raise FloatingPointError("the answers to a shift of the input are not finite")
        return Response(**{name: tuple(values) for name, values in columns.items()})


def respond(
    suspect: Denoiser, reference: Denoiser, tau: Tensor, samples: Tensor, levels: tuple[int, ...], pairs: int, seed: int
) -> Response:
    """Measure the response to one shift s_t * tau on fresh noise; see `Bench`."""
    return Bench(suspect, reference, samples, levels, pairs=pairs, seed=seed).respond(tau)


def _slope(delta: Tensor, tau: Tensor) -> float:
    return ((delta * tau).sum() / tau.square().sum()).item()
