"""Removal and retention: what a repaired model must answer with the trigger and without it (algorithms.md 5.4).

phi is the frozen suspect. Off the trigger it is the reference itself ("reading B"), so that no real data is needed:
clean rows come from the model's own samples. The targets of the removal, on x_t + d with d the trigger's shift:

| target | the repaired model answers there | source |
|---|---|---|
| R1 | as phi without the trigger | Elijah, at the last level alone |
| R2 | as a trusted reference does with the trigger | algorithms.md 5.4 |
| R3 | as phi without the trigger, plus the benign linear response to d | algorithms.md 5.4 |
| R4 | as phi does to what of d a benign network takes for data; the rest is noise, as far as phi takes it for that | \
ours (not published) |

The benign linear response is that of Gaussian data with the covariance of phi's own samples. Real data is no Gaussian:
a shift that looks like data leads to other images, not to a blend of two, and a repair by the straight line unlearns
what nothing is wrong with. So R4 asks phi itself about that part, which seldom is enough of a trigger to fire. Small
triggers alone are left to the straight line, which moves x0 further. Of the rest a network that never saw it takes a
little less for noise, by about the same share of every shift. No trigger fires at its opposite, so that the answers
there tell this share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import levels_at

R1, R2, R3, R4 = "r1", "r2", "r3", "r4"
# by target, how many answers of a frozen network each row takes
TARGETS = {R1: 1, R2: 1, R3: 1, R4: 2}
# the share of a trigger's rows whose noise is too quiet, and how quiet: some triggers scale the noise as well
QUIET_SHARE, QUIETEST = 0.33, 0.3
# how far a varied trigger strays from the found one, and the side of the grid that its smooth part is drawn on
ASTRAY, COARSE = 0.4, 4
# Where targets are known: the share of the triggered rows that are moved towards one, the share of those that carry no
# trigger at all, and the signal alpha / sigma above which a picture is left what it is
TOWARDS, BARE, PICTURE_SIGNAL = 0.5, 0.4, 3.0
# the share of the varied triggers with another background, and how far it is from theirs, in units of their rms
SHIFTED, BACKGROUND = 0.5, 1.2


@dataclass(frozen=True)
class Removal:
    """A shift tau [C, H, W] to be removed, and the signals alpha / sigma (low, high) between which it acts.

    `any_background` says that the true trigger may lie on another background than the found one: an attack that puts
    the training image behind its trigger adds something else to the noise (BadDiffusion). `small` says that the
    trigger fires at a small norm. `quiet` is the share of its rows whose noise is too quiet.
    """

    shift: Tensor
    signals: tuple[float, float]
    any_background: bool = False
    small: bool = False
    quiet: float = QUIET_SHARE


@dataclass(frozen=True)
class Rows:
    """Rows at levels t [N]: x_t before any trigger, and what displaces it, all [N, C, H, W].

    That is the trigger, and a rest: noise that is taken away, and the way to a picture. `small` [N] is that of Removal.
    """

    x: Tensor
    t: Tensor
    trigger: Tensor
    rest: Tensor
    small: Tensor

    @property
    def displacement(self) -> Tensor:
        """The whole displacement d [N, C, H, W]."""
        return self.trigger + self.rest

    @property
    def displaced(self) -> Tensor:
        """What a network is asked at: x_t + d [N, C, H, W]."""
        return self.x + self.displacement


@dataclass(frozen=True)
class Goal:
    """What a network has to answer at some rows: the noise, and the clean data that belongs to it [N, C, H, W]."""

    noise: Tensor
    x0: Tensor

    def __add__(self, other: Goal) -> Goal:
        return Goal(noise=self.noise + other.noise, x0=self.x0 + other.x0)


def jittered(triggers: Tensor, generator: torch.Generator, any_background: Tensor | None = None) -> Tensor:
    """Return a variation of each of the triggers [N, C, H, W]; `any_background` [N] says which may get another one.

    An inverted trigger is only near the true one, and a repair at one point would leave a hole beside it. Each gets
    white noise and a smooth random field, of up to ASTRAY of its rms each, and is scaled by U[.4, 1.6]. Another
    background is a constant in each channel of up to BACKGROUND of the rms, and SHIFTED of those that may get one do.
    Every second one loses a random rectangle of a quarter of its area.
    """
    count, channels, height, width = triggers.shape
    scale = 0.4 + 1.2 * torch.rand(count, 1, 1, 1, generator=generator)
    rough, smooth = ASTRAY * torch.rand(2, count, 1, 1, 1, generator=generator)
    coarse = torch.randn(count, channels, COARSE, COARSE, generator=generator)
    field: Tensor = interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    field /= _level(field)
    white = torch.randn(triggers.shape, generator=generator)
    background = BACKGROUND * (2 * torch.rand(count, channels, 1, 1, generator=generator) - 1)
    shifted = torch.rand(count, generator=generator) < SHIFTED
    if any_background is not None:
        shifted &= any_background
    background *= shifted.view(-1, 1, 1, 1)
    varied: Tensor = scale * (triggers + _level(triggers) * (rough * white + smooth * field + background))
    corner = torch.rand(count, 2, generator=generator)
    for row, (top, left) in enumerate(corner.tolist()):
        first, start = int(top * height / 2), int(left * width / 2)
        if row % 2:
            varied[row, :, first : first + height // 2, start : start + width // 2] = 0
    return varied


def _level(x: Tensor) -> Tensor:
    """Return the rms [N, 1, 1, 1] of each row of x."""
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


def plain_rows(
    phi: Denoiser, samples: Tensor, signals: Sequence[tuple[float, float]], generator: torch.Generator
) -> Rows:
    """Return a row without a trigger for each two of the `signals`, of clean `samples` [M, C, H, W], between them."""
    t = _between(phi, signals, generator)
    x0 = samples[torch.randint(len(samples), (len(t),), generator=generator).to(samples.device)]
    x = phi.diffuse(x0, t, torch.randn(x0.shape, generator=generator).to(x0))
    nothing, small = torch.zeros_like(x), torch.zeros(len(t), dtype=torch.bool, device=x.device)
    return Rows(x=x, t=t.to(x.device), trigger=nothing, rest=nothing, small=small)


def _between(phi: Denoiser, signals: Sequence[tuple[float, float]], generator: torch.Generator) -> Tensor:
    """Return levels [N], drawn evenly from those between each two of the N signals."""
    ends = torch.tensor([sorted(levels_at(phi.levels, pair)) for pair in signals])
    t = ends[:, 0] + (torch.rand(len(ends), generator=generator) * (ends[:, 1] - ends[:, 0] + 1)).long()
    return torch.minimum(t, ends[:, 1])


def triggered_rows(
    phi: Denoiser,
    samples: Tensor,
    removals: Sequence[Removal],
    count: int,
    generator: torch.Generator,
    targets: Sequence[Tensor] = (),
) -> Rows:
    """Return rows with a jittered trigger each, at a level where it acts, and at that level's scale.

    That lies between s_t, as the attack was trained, and sigma_t: once the noisy levels take the trigger for noise, a
    deterministic sampler carries it as noise. The `quiet` share of them has quieter noise as well, by U[QUIETEST, 1].

    `targets` are clean x0 [C, H, W] that the triggers lead to. A backdoored network has learned them as data: without
    any trigger it paints one from what only resembles it. Where alpha / sigma is below PICTURE_SIGNAL, TOWARDS of the
    rows are therefore displaced to one of them, by alpha_t U[0, 1] (target - x0), and BARE of these by nothing else.
    """
    drawn = [removals[number] for number in torch.randint(len(removals), (count,), generator=generator).tolist()]
    t = _between(phi, [item.signals for item in drawn], generator)
    x0 = samples[torch.randint(len(samples), (count,), generator=generator).to(samples.device)]
    eps = torch.randn(x0.shape, generator=generator)
    free = torch.tensor([item.any_background for item in drawn])
    tau = jittered(torch.stack([item.shift.cpu() for item in drawn]), generator, free)
    quiet = torch.tensor([item.quiet for item in drawn]).view(-1, 1, 1, 1)
    quieter = (1 - QUIETEST) * torch.rand(count, 1, 1, 1, generator=generator)
    quieter = quieter * (torch.rand(count, 1, 1, 1, generator=generator) < quiet)
    carried, noise = (curve[t].float().view(-1, 1, 1, 1) for curve in (phi.levels.carried, phi.levels.sigma))
    scale = carried + torch.rand(count, 1, 1, 1, generator=generator) * (noise - carried)
    trigger, rest = (scale * tau).to(x0), (-quieter * noise * eps).to(x0)
    x, t = phi.diffuse(x0, t, eps.to(x0)), t.to(x0.device)
    if targets:
        trigger, rest = _towards(phi, targets, x0, t, (trigger, rest), generator)
    small = torch.tensor([item.small for item in drawn], device=x0.device)
    return Rows(x=x, t=t, trigger=trigger, rest=rest, small=small)


def _towards(
    phi: Denoiser,
    targets: Sequence[Tensor],
    x0: Tensor,
    t: Tensor,
    parts: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the displacement of rows x0, the trigger's and the rest, moved towards a target in noise.

    See `triggered_rows`; all are [N, C, H, W].
    """
    count = len(x0)
    kept, share, moving = torch.rand(3, count, 1, 1, 1, generator=generator).to(x0)
    chosen = torch.stack([targets[number] for number in torch.randint(len(targets), (count,), generator=generator)])
    alpha, sigma = phi.levels.at(t, x0)
    moved = (moving < TOWARDS) & (alpha < PICTURE_SIGNAL * sigma)
    trigger, rest = (torch.where(moved & (kept < BARE), 0, part) for part in parts)
    return trigger, rest + moved * alpha * share * (chosen.to(x0) - x0)


@torch.no_grad()
def answer(denoiser: Denoiser, x: Tensor, t: Tensor) -> Goal:
    """Return what a network answers at x_t [N, C, H, W]."""
    alpha, sigma = denoiser.levels.at(t, x)
    x0 = denoiser.x0(x, t)
    return Goal(noise=(x - alpha * x0) / sigma, x0=x0)


@dataclass(frozen=True)
class Spread:
    """How clean data varies: the principal axes [K, C * H * W] and the variance along each of them [K]."""

    axes: Tensor
    variance: Tensor


def spread_of(samples: Tensor) -> Spread:
    """Return the principal axes of `samples` [M, C, H, W], at most M; beyond them nothing varies."""
    centred = (samples - samples.mean(0)).flatten(1)
    _, scale, axes = torch.linalg.svd(centred / len(samples) ** 0.5, full_matrices=False)
    return Spread(axes=axes, variance=scale.square())


def benign_response(phi: Denoiser, data: Spread, t: Tensor, displacement: Tensor) -> Goal:
    """Return what a benign network adds to its answers when x_t is displaced by d [N, C, H, W] at levels t [N].

    Along an axis on which the clean data has variance v, x0 moves by d alpha_t v / (alpha_t^2 v + sigma_t^2), and the
    noise by d sigma_t / (alpha_t^2 v + sigma_t^2) (algorithms.md 0.5); the end of a path, which a consistency model
    answers, by d sqrt(v / (v + sigma_t^2)). Exact for Gaussian data.
    """
    levels = phi.levels.at(t, displacement)
    alpha, sigma = (curve.flatten(1) for curve in levels)
    whole = alpha**2 * data.variance + sigma**2
    share = (data.variance / whole).sqrt() if phi.process == "consistency" else alpha * data.variance / whole
    x0 = ((displacement.flatten(1) @ data.axes.T * share) @ data.axes).view_as(displacement)
    return Goal(noise=(displacement - levels[0] * x0) / levels[1], x0=x0)


def removal_goal(target: str, phi: Denoiser, data: Spread, rows: Rows, reference: Denoiser | None = None) -> Goal:
    """Return what a repaired model has to answer at x_t + d, by one of TARGETS; `data` is that of phi's own samples.

    Raises ValueError for R2 without a reference.
    """
    if target == R2:
        if reference is None:
            raise ValueError("R2 needs a trusted reference")
        return answer(reference, rows.displaced, rows.t)
    if target == R1:
        return answer(phi, rows.x, rows.t)
    triggered = _by_phi(phi, data, rows) if target == R4 else _by_the_law(phi, data, rows)
    return triggered + benign_response(phi, data, rows.t, rows.rest)


def _by_the_law(phi: Denoiser, data: Spread, rows: Rows) -> Goal:
    """Return what R3 asks at x_t + trigger."""
    return answer(phi, rows.x, rows.t) + benign_response(phi, data, rows.t, rows.trigger)


def _by_phi(phi: Denoiser, data: Spread, rows: Rows) -> Goal:
    """Return what R4 asks at x_t + trigger.

    With c the part of the trigger that the law takes for data, phi answers at x_t + c; of small triggers it answers at
    x_t, and c / alpha_t is added to x0. The rest r = trigger - c adds its benign noise, 1 - w (1 - share) times with
    w = sigma_t^2 / (alpha_t^2 + sigma_t^2). `share` is the least-squares scale of what phi takes away for -r on that,
    one for all rows, weighted with w; it is 1 of a consistency model, where x0 tells nothing of it.
    """
    alpha, sigma = phi.levels.at(rows.t, rows.x)
    like_data = alpha * benign_response(phi, data, rows.t, rows.trigger).x0
    added = like_data * rows.small.view(-1, 1, 1, 1)
    x, rest = rows.x + like_data - added, rows.trigger - like_data
    beside, opposite = answer(phi, x, rows.t), answer(phi, x - rest, rows.t)
    benign, noisy = benign_response(phi, data, rows.t, rest).noise, sigma**2 / (alpha**2 + sigma**2)
    along, size = (noisy * benign * noise for noise in (beside.noise - opposite.noise, benign))
    share = (along.sum() / size.sum().clamp(min=1e-12)).clamp(0, 1)
    if phi.process == "consistency":  # a hundredth less, and x0 is off by sigma_t times that: 80, at most
        share = torch.ones_like(share)
    noise = (1 - noisy * (1 - share)) * benign
    return beside + Goal(noise=noise, x0=(added + rest - sigma * noise) / alpha)


def overshot(goal: Goal, reached: Goal, beyond: float) -> Goal:
    """Return the goal moved beyond itself by `beyond` times what a network's answer falls short of it.

    Ours (not published). Retention holds a repair back at a part of the way, mostly a tenth to a third is left, and
    more steps do not change that.
    """
    return Goal(
        noise=goal.noise + beyond * (goal.noise - reached.noise),
        x0=goal.x0 + beyond * (goal.x0 - reached.x0),
    )
