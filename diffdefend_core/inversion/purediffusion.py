"""PureDiffusion (Truong & Le, arXiv 2409.13945 and 2502.19047): one shift that explains the answers at several levels.

Only the abstracts could be read, and there is no public code (algorithms.md 2.3). Published: the shift moves the
expected prediction at many levels by lambda_t times itself, and triggered noises denoise to the same content. INFERRED:
the form of both losses, lambda_t in closed form, the levels, the weight, the optimiser and every number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.elijah import bare_candidate, relative_loss, start_shift
from diffdefend_core.inversion.invert import Inversion, Progress
from diffdefend_core.options import PureDiffusionOptions


def invert(
    suspect: Denoiser, model_digest: str, options: PureDiffusionOptions, *, seed: int, progress: Progress
) -> Inversion:
    """Return a candidate `<start>/<family>` for each pair; the best is that of lowest loss relative to its L1 norm.

    A candidate's `response` is the lambda_t that were imposed. Raises InputError for an unknown start or family, for
    levels that the model does not have or whose last one carries no signal, and FloatingPointError if the model's
    answers are not finite.
    """
    times = _times(suspect.levels, options.levels)
    problem = _Problem(suspect, times, options, seed)
    begun = {name: start_shift(name, suspect, seed) for name in options.starts}
    scales = {family: tuple(scale(suspect.levels, t, family) for t in times) for family in options.families}
    searches = [(name, family) for name in options.starts for family in options.families]
    total = len(searches) * options.iterations
    triggers: dict[str, Tensor] = {}
    candidates = []
    for number, (name, family) in enumerate(searches):
        said = _from(progress, number, options, total)
        tau, losses = _search(problem, begun[name], scales[family], options, said)
        candidate = bare_candidate(f"{name}/{family}", tau, losses, scales[family])
        triggers[candidate.name] = tau
        candidates.append(candidate)
    best = min(candidates, key=lambda item: relative_loss(item, triggers[item.name]))
    record = InvertedTrigger(
        model_digest=model_digest,
        method="purediffusion",
        seed=seed,
        timesteps=times,
        candidates=tuple(candidates),
        best=best.name,
        forward_equivalents=(1 + 3 * total) * len(times) * options.batch,
    )
    return Inversion(record=record, triggers=triggers)


def scale(levels: Levels, t: int, family: str) -> float:
    """Return lambda_t at level t >= 1, the response that keeps a trigger on its path s_t = `levels.carried`.

    With a = alpha_t / alpha_{t-1}, `sde` (ancestral sampling, reverse SDE) is
    sigma_t (s_t - a s_{t-1}) / (sigma_t^2 - a^2 sigma_{t-1}^2): sigma_t / (1 + a) for VP, 0.5 near the end. `ode`
    (DDIM, Euler) is (s_t - a s_{t-1}) / (sigma_t - a sigma_{t-1}). Source: algorithms.md 0.4; INFERRED for
    PureDiffusion. Raises InputError for another family.
    """
    ratio, shift = levels.alpha[t] / levels.alpha[t - 1], levels.carried
    sigma, before = levels.sigma[t], ratio * levels.sigma[t - 1]
    moved = shift[t] - ratio * shift[t - 1]
    if family == "sde":
        return (sigma * moved / (sigma**2 - before**2)).item()
    if family == "ode":
        return (moved / (sigma - before)).item()
    raise InputError(f"attack family {family!r}", expected="sde or ode", action="correct the setting")


class _Problem:
    """Fixed noise at every level, and the answers to it without any shift. INFERRED: x0 = 0, as alpha_t is small."""

    def __init__(self, suspect: Denoiser, times: tuple[int, ...], options: PureDiffusionOptions, seed: int) -> None:
        levels, self.suspect = suspect.levels, suspect
        count, device = options.batch, suspect.device
        generator = torch.Generator().manual_seed(seed + 1)
        eps = torch.randn((len(times), count, *suspect.shape), generator=generator).to(device)
        self.sigma, self.carried = (
            curve[list(times)].to(eps).view(-1, 1, 1, 1, 1) for curve in (levels.sigma, levels.carried)
        )
        self.alpha = levels.alpha[times[-1]].item()
        self.x, self.t = self.sigma * eps, torch.tensor(times).repeat_interleave(count).to(device)
        with torch.no_grad():
            self.plain, self.plain_spread = self.answer(None)

    def answer(self, tau: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean predicted noise [levels, C, H, W], and the spread of x0 at the last level, a scalar.

        The spread is half of the mean squared distance of two predictions of x0 from different noises.
        """
        x = self.x if tau is None else self.x + self.carried * tau
        noise = self.suspect.noise(x.flatten(0, 1), self.t).view_as(x)
        x0 = (x[-1] - self.sigma[-1] * noise[-1]) / self.alpha
        return noise.mean(1), x0.var(dim=0, correction=0).mean()

    def loss(self, tau: Tensor, scales: Tensor, weight: float) -> Tensor:
        """Return the distribution shift over the levels plus `weight` times the denoising consistency.

        The first is the mean of | mean noise(tau) - mean noise(0) - lambda_t tau | over levels and elements; the second
        is spread / (spread + spread without a shift), 1/2 for no shift and 0 for one content: bounded (ours), since the
        spread itself is huge where a network is about to switch, and hides all else.
        """
        mean, spread = self.answer(tau)
        shift = (mean - self.plain - scales * tau).abs().mean()
        return shift + weight * spread / (spread + self.plain_spread).clamp(min=1e-12)


def _search(
    problem: _Problem,
    start: Tensor,
    scales: tuple[float, ...],
    options: PureDiffusionOptions,
    progress: Callable[[int], None],
) -> tuple[Tensor, list[Tensor]]:
    """Return tau [C, H, W] on the CPU and the loss before every step of Adam."""
    tau = start.clone().requires_grad_(True)
    imposed = torch.tensor(scales).to(tau).view(-1, 1, 1, 1)
    optimiser = torch.optim.Adam([tau], lr=options.learning_rate)
    losses = []
    for step in range(options.iterations):
        loss = problem.loss(tau, imposed, options.consistency)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
        progress(step + 1)
    return tau.detach().cpu(), losses


def _times(levels: Levels, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Return the level index of each share of the number of levels: 999 and 799 for 1 and 0.8 of 1000."""
    times = tuple(round(share * len(levels)) - 1 for share in shares)
    if not times or not all(1 <= t < len(levels) for t in times) or levels.alpha[times[-1]] == 0:
        raise InputError(
            f"levels {shares} of a model with {len(levels)}",
            expected="shares of at most 1 that name its second level or above, the last one with some signal",
            action="correct the setting",
        )
    return times


def _from(progress: Progress, number: int, options: PureDiffusionOptions, total: int) -> Callable[[int], None]:
    return lambda step: progress("PureDiffusion", number * options.iterations + step, total)
