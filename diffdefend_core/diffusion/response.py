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
    without any shift.
    """

    difference: tuple[float, ...]
    gain: tuple[float, ...]
    slope: tuple[float, ...]
    x0_slope: tuple[float, ...]
    baseline: tuple[float, ...]
    untreated: Tensor


@torch.no_grad()
def respond(
    suspect: Denoiser, reference: Denoiser, tau: Tensor, samples: Tensor, levels: tuple[int, ...], pairs: int, seed: int
) -> Response:
    """Measure the response to the shift s_t * tau on fresh noise, `pairs` antithetic pairs at each of `levels`.

    Raises FloatingPointError if an answer is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[float]] = {"difference": [], "gain": [], "slope": [], "x0_slope": [], "baseline": []}
    untreated = torch.zeros_like(tau)
    for t in levels:
        at = probe(samples, t, pairs, generator)
        alpha, sigma = suspect.levels.alpha[t].item(), suspect.levels.sigma[t].item()
        carried = suspect.levels.carried[t].item()
        shift = carried * tau
        plain, plain_reference = mean_answer(suspect, at, None), mean_answer(reference, at, None)
        delta = mean_answer(suspect, at, shift) - plain
        delta_reference = mean_answer(reference, at, shift) - plain_reference
        rest = shift - sigma * delta
        slope, slope_reference = _slope(delta, tau), _slope(delta_reference, tau)
        columns["difference"].append((rms(delta - delta_reference) / rms(tau)).item())
        columns["gain"].append((rms(rest) / rms(shift)).item())
        columns["slope"].append(slope)
        columns["x0_slope"].append(sigma * (slope_reference - slope) / alpha)
        columns["baseline"].append(rms(plain - plain_reference).item())
        untreated += rest / (suspect.levels.initial_scale * len(levels))
    if not math.isfinite(sum(columns["baseline"]) + untreated.sum().item()):
        raise FloatingPointError("the answers to a shift of the input are not finite")
    return Response(untreated=untreated, **{name: tuple(values) for name, values in columns.items()})


def _slope(delta: Tensor, tau: Tensor) -> float:
    return ((delta * tau).sum() / tau.square().sum()).item()
