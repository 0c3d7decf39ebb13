"""TERD (Mo et al., ICML 2024): the shift under which two noises on the same image are answered alike.

Read in its public code (algorithms.md 2.2). The unknown target cancels in the difference of the two answers, so that
neither it nor lambda is needed. The first stage puts noise in place of the image, the second one draws it from the
model, with the gradient going through the sampler. With `gamma` the deviation of the noise is fitted too (TrojDiff).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import trailing_steps
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.elijah import bare_candidate, start_shift
from diffdefend_core.inversion.invert import Inversion, Progress
from diffdefend_core.options import TerdOptions

GAMMA_FLOOR = 0.02  # a deviation of 0 has an infinite divergence from N(0, I)
TROJDIFF_MOMENTUM = 0.9  # of the refinement, in the code for TrojDiff alone


@dataclass(frozen=True)
class BiasedNoise:
    """The initial noise under attack, gamma * eps + mu, both [C, H, W]; gamma is None where it is 1 and not fitted."""

    mu: Tensor
    gamma: Tensor | None

    def scaled(self, eps: Tensor) -> Tensor:
        """Return gamma * eps."""
        return eps if self.gamma is None else self.gamma * eps


def invert(suspect: Denoiser, model_digest: str, options: TerdOptions, *, seed: int, progress: Progress) -> Inversion:
    """Return the candidate `mu`, which is always the best, and with `options.gamma` a second one named `gamma`.

    Its tensor [C, H, W] is a deviation per pixel and no shift. Raises InputError for an unknown start, for more
    refinement steps than levels, and for gamma with a model that is not VP; FloatingPointError if the model's answers
    are not finite.
    """
    _check(suspect, options)
    mu = start_shift(options.start, suspect, seed).requires_grad_(True)
    bias = BiasedNoise(mu, torch.ones_like(mu).requires_grad_(True) if options.gamma else None)
    generator = torch.Generator().manual_seed(seed + 1)
    noisy, clean = _ends(len(suspect.levels), options.ends)

    def estimation() -> Tensor:
        x0 = _normal(suspect, options.batch, generator)
        return _at_random(suspect, x0, noisy, bias, generator)

    def refinement() -> Tensor:
        x0 = draw(suspect, _normal(suspect, options.batch, generator), bias, options.refinement_steps)
        with_mu = _at_random(suspect, x0, noisy, bias, generator)
        return (with_mu + _at_random(suspect, x0, clean, bias, generator, shifted=False)) / 2

    losses = [
        *_descend(estimation, bias, options, options.iterations, progress),
        *_descend(refinement, bias, options, options.refinement_iterations, progress, refining=True),
    ]
    triggers = {"mu": mu.detach().cpu()} | ({} if bias.gamma is None else {"gamma": bias.gamma.detach().cpu()})
    record = InvertedTrigger(
        model_digest=model_digest,
        method="terd",
        seed=seed,
        timesteps=(*noisy, *clean),
        candidates=tuple(bare_candidate(name, value, losses) for name, value in triggers.items()),
        best="mu",
        forward_equivalents=evaluations(options),
    )
    return Inversion(record=record, triggers=triggers)


def evaluations(options: TerdOptions) -> int:
    """Return the cost in forward-equivalents: pairs at one end, then drawn images and pairs at both ends."""
    refined = options.refinement_iterations * (options.refinement_steps + 4)
    return 3 * options.batch * (2 * options.iterations + refined)


def reversed_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, bias: BiasedNoise, *, shifted: bool
) -> Tensor:
    """Return 1/2 || (eps_1 - noise(x_1)) - (eps_2 - noise(x_2)) ||^2, the mean over the rows of x0 [N, C, H, W].

    x_i = alpha_t x0 + sigma_t gamma eps_i + s_t mu, with s_t = 0 unless `shifted`; eps [2N, C, H, W] holds eps_1, then
    eps_2; t [N] are indices on the CPU.
    """
    levels, both = denoiser.levels, torch.cat([t, t])
    alpha, sigma = levels.at(both, x0)
    x = alpha * torch.cat([x0, x0]) + sigma * bias.scaled(eps)
    if shifted:
        x = x + levels.carried[both].to(x0).view(-1, 1, 1, 1) * bias.mu
    first, second = (eps - denoiser.noise(x, both.to(x.device))).chunk(2)
    return 0.5 * (first - second).square().sum(dim=(1, 2, 3)).mean()


def draw(denoiser: Denoiser, eps: Tensor, bias: BiasedNoise, steps: int) -> Tensor:
    """Return images [N, C, H, W] drawn from initial_scale * (gamma eps + mu), with gradients to mu and gamma.

    The deterministic steps are x_s = alpha_s x0 + sigma_s noise: DDIM for VP, Euler's for VE and flow. x0 is clamped
    to the clean range where it has one, as in the released code. With gamma the steps are those of TrojDiff's own
    sampler, whose noise is gamma * answer + mu.
    """
    levels, times = denoiser.levels, trailing_steps(len(denoiser.levels), steps)
    x = levels.initial_scale * (bias.scaled(eps) + bias.mu)
    for t, following in zip(times, [*times[1:], None], strict=True):
        alpha, sigma = levels.alpha[t].item(), levels.sigma[t].item()
        clean, noise = answers(denoiser, x, t)
        if bias.gamma is not None:
            noise = bias.gamma * noise + bias.mu
            clean = (x - sigma * noise) / alpha
        if denoiser.clean_range is not None:
            clean = clean.clamp(*denoiser.clean_range)
        if following is None:
            x = clean
        else:
            x = levels.alpha[following].item() * clean + levels.sigma[following].item() * noise
    return x


def answers(denoiser: Denoiser, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Return the predicted x0 and noise [N, C, H, W] at one level, by one network call.

    Where alpha_t = 0, at the last level of a flow, x is the noise.
    """
    index = torch.full((len(x),), t, device=x.device)
    alpha, sigma = denoiser.levels.alpha[t].item(), denoiser.levels.sigma[t].item()
    if alpha == 0:
        return denoiser.x0(x, index), x
    noise = denoiser.noise(x, index)
    return (x - sigma * noise) / alpha, noise


def _descend(
    loss: Callable[[], Tensor],
    bias: BiasedNoise,
    options: TerdOptions,
    iterations: int,
    progress: Progress,
    *,
    refining: bool = False,
) -> list[Tensor]:
    """Take the steps of one stage in place; return loss - weight * ||mu||_1 before each of them."""
    parameters = [bias.mu] if bias.gamma is None else [bias.mu, bias.gamma]
    rates = (options.learning_rate, options.gamma_learning_rate)
    groups = [{"params": [value], "lr": rate} for value, rate in zip(parameters, rates, strict=False)]
    momentum = TROJDIFF_MOMENTUM if refining and bias.gamma is not None else 0.0
    optimiser = torch.optim.SGD(groups, lr=options.learning_rate, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, iterations))
    losses = []
    for step in range(iterations):
        objective = loss() - options.weight * bias.mu.abs().sum()
        optimiser.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        if refining:
            torch.nn.utils.clip_grad_norm_(parameters, options.gradient_clip)
        optimiser.step()
        schedule.step()
        if bias.gamma is not None:
            bias.gamma.data.clamp_(min=GAMMA_FLOOR)
        losses.append(objective.detach())
        progress("TERD refinement" if refining else "TERD estimation", step + 1, iterations)
    return losses


def _at_random(
    denoiser: Denoiser,
    x0: Tensor,
    levels: tuple[int, ...],
    bias: BiasedNoise,
    generator: torch.Generator,
    *,
    shifted: bool = True,
) -> Tensor:
    """Return the reversed loss at levels drawn uniformly from `levels`, one for each row of x0."""
    t = torch.tensor(levels)[torch.randint(len(levels), (len(x0),), generator=generator)]
    return reversed_loss(denoiser, x0, t, _normal(denoiser, 2 * len(x0), generator), bias, shifted=shifted)


def _normal(denoiser: Denoiser, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn((count, *denoiser.shape), generator=generator).to(denoiser.device)


def _ends(total: int, share: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the noisiest and the least noisy share of the levels, at least one each: 990..999 and 0..9 of 1000."""
    count = max(1, round(share * total))
    return tuple(range(total - count, total)), tuple(range(count))


def _check(suspect: Denoiser, options: TerdOptions) -> None:
    if options.gamma and suspect.levels.kind != "vp":
        raise InputError(
            f"gamma for a model of family {suspect.family} ({suspect.process})",
            expected="a VP model, the only kind that TrojDiff attacks",
            action="leave gamma off",
        )
    if not 1 <= options.refinement_steps <= len(suspect.levels):
        raise InputError(
            f"{options.refinement_steps} refinement steps",
            expected=f"1 to {len(suspect.levels)}, the number of levels of the model",
            action="correct the setting",
        )
