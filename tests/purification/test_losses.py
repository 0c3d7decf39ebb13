"""What a repaired model must answer: jitter within its bounds, and the benign response in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, perfect_of, small_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import alphas_cumprod, linear_betas
from diffdefend_core.diffusion.response import levels_at
from diffdefend_core.purification.losses import (
    ASTRAY,
    BACKGROUND,
    BARE,
    PICTURE_SIGNAL,
    QUIET_SHARE,
    QUIETEST,
    SHIFTED,
    TARGETS,
    TOWARDS,
    Goal,
    Removal,
    Rows,
    answer,
    benign_response,
    jittered,
    overshot,
    plain_rows,
    removal_goal,
    spread_of,
    triggered_rows,
)

LEVELS = vp_levels()
TRIGGERS = torch.stack([torch.full(SHAPE, 0.5), torch.full(SHAPE, -1.0)])
CHECKER = 0.8 * torch.where((torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0, 1.0, -1.0).expand(1, *SHAPE)
# rows of a Hadamard matrix: mean 0 and the same variance .25 along every direction
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
HADAMARD = SIGNS
for _ in range(5):
    HADAMARD = torch.kron(HADAMARD, SIGNS)
SAMPLES = 0.5 * torch.cat([HADAMARD, -HADAMARD]).view(128, *SHAPE)
SPREAD = spread_of(SAMPLES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(signals: tuple[float, float], count: int = 64, triggers: Tensor = TRIGGERS) -> Rows:
    removals = [Removal(item, signals) for item in triggers]
    return triggered_rows(clean_denoiser(LEVELS), SAMPLES, removals, count, generator())


def rows_of(t: list[int], displacement: Tensor, x: Tensor | None = None, small: bool = False) -> Rows:
    shape = (len(t), *SHAPE)
    return Rows(
        x=torch.randn(shape, generator=generator()) if x is None else x,
        t=torch.tensor(t),
        trigger=displacement.expand(shape),
        rest=torch.zeros(shape),
        small=torch.full((len(t),), small),
    )


def on_another_background(varied: Tensor) -> Tensor:
    """Return which variations of a trigger of mean 0 have got a constant; small ones are not seen."""
    return (varied.mean((2, 3)).abs() > 0.1 * varied.square().mean((1, 2, 3)).sqrt()[:, None]).any(1)


def test_jitter_scales_within_its_bounds() -> None:
    trigger = CHECKER
    found = jittered(trigger.expand(800, *SHAPE), generator())[::2]  # even rows have no hole
    found = found[~on_another_background(found)]
    scale = (found * trigger).sum((1, 2, 3)) / trigger.square().sum()
    astray = (found - scale.view(-1, 1, 1, 1) * trigger).square().mean((1, 2, 3)).sqrt() / found.square().mean().sqrt()
    assert 0.4 / (1 + ASTRAY) < scale.min() < 0.55 and 1.45 < scale.max() < 1.6 * (1 + ASTRAY)
    assert scale.mean().item() == pytest.approx(1, abs=0.06)
    assert astray.min() < 0.1 < 0.2 < astray.median() and astray.max() < 1.6 * 2 * ASTRAY


def test_jitter_cuts_a_quarter_out_of_every_second_row_and_leaves_the_triggers_as_they_are() -> None:
    triggers = TRIGGERS.repeat(20, 1, 1, 1)
    before = triggers.clone()
    found = jittered(triggers, generator())
    holes = (found == 0).sum((1, 2, 3))
    assert (holes[1::2] == 16).all() and (holes[::2] == 0).all()
    corners = {tuple((row[0] == 0).nonzero()[0].tolist()) for row in found[1::2]}
    assert len(corners) > 5
    assert torch.equal(triggers, before)


def test_half_of_the_variations_lie_on_another_background_in_each_channel() -> None:
    trigger = CHECKER.expand(1, 3, 8, 8)
    found = jittered(trigger.expand(400, 3, 8, 8), generator())[::2]
    shifted = on_another_background(found)
    # a smooth field has a mean as well
    assert SHIFTED - 0.1 < shifted.float().mean() < SHIFTED + 0.25
    means = found[shifted].mean((2, 3)) / 0.8
    assert means.abs().max() < 1.6 * (BACKGROUND + ASTRAY)
    assert (means.max(1).values - means.min(1).values).median() > 0.3
    assert (means > 0.2).any() and (means < -0.2).any()


def test_only_where_it_may_a_variation_gets_another_background() -> None:
    may = torch.arange(400) % 4 == 0
    found = jittered(CHECKER.expand(400, *SHAPE), generator(), may)[::2]
    offset = found.mean((1, 2, 3)).abs() / found.square().mean((1, 2, 3)).sqrt()
    assert offset[may[::2]].max() > 0.5 > offset[~may[::2]].max()


def test_no_trigger_stays_none() -> None:
    assert not jittered(torch.zeros(4, *SHAPE), generator()).any()


def test_rows_lie_where_their_trigger_acts() -> None:
    noisy, moderate = (0.005, 0.05), (0.5, 2.0)
    removals = [Removal(TRIGGERS[0], noisy), Removal(TRIGGERS[1], moderate)]
    rows = triggered_rows(clean_denoiser(LEVELS), torch.zeros_like(SAMPLES), removals, 200, generator())
    (high, low), (top, bottom) = levels_at(LEVELS, noisy), levels_at(LEVELS, moderate)
    in_noise = (rows.t >= low) & (rows.t <= high)
    assert (in_noise | ((rows.t >= bottom) & (rows.t <= top))).all()
    assert 60 < in_noise.sum() < 140 and len(rows.t.unique()) > 20
    quiet_or_not = rows.displacement.mean((1, 2, 3))
    assert (quiet_or_not[in_noise] > 0).float().mean() > 0.8 > 0.2 > (quiet_or_not[~in_noise] > 0).float().mean()


def test_rows_without_a_trigger_lie_at_all_levels_between_their_signals() -> None:
    rows = plain_rows(clean_denoiser(LEVELS), SAMPLES, [(0.05, 0.5)] * 400 + [(0.5, 2.0)] * 200, generator())
    last, middle, first = levels_at(LEVELS, (0.05, 0.5, 2.0))
    assert rows.t[:400].min() == middle and rows.t[:400].max() == last
    assert rows.t[400:].min() == first and rows.t[400:].max() == middle
    assert not rows.displacement.any()
    alpha, sigma = LEVELS.at(rows.t, rows.x)
    expected = ((0.25 * alpha**2 + sigma**2).sqrt()).mean().item()
    assert rows.x.std((1, 2, 3)).mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("share", [QUIET_SHARE, 0.6])
def test_some_of_the_triggered_rows_have_quieter_noise(share: float) -> None:
    removals = [Removal(torch.zeros(SHAPE), (0.005, 0.05), quiet=share)]
    rows = triggered_rows(clean_denoiser(LEVELS), torch.zeros_like(SAMPLES), removals, 400, generator())
    ratio = rows.displaced.std((1, 2, 3)) / rows.x.std((1, 2, 3))
    assert QUIETEST - 0.01 < ratio.min() < 0.4 and ratio.max() < 1 + 1e-5
    assert (ratio < 1 - 1e-5).float().mean().item() == pytest.approx(share, abs=0.08)


def test_a_shift_is_between_that_of_the_attack_and_that_of_the_noise() -> None:
    phi, samples = clean_denoiser(LEVELS), torch.zeros_like(SAMPLES)
    rows = triggered_rows(phi, samples, [Removal(1e3 * CHECKER[0], (0.4, 2.0))], 400, generator())
    # along the trigger, which no background changes
    mean = (rows.displacement[::2] * CHECKER).sum((1, 2, 3)) / CHECKER.square().sum() / 1e3
    least, most = (curve[rows.t[::2]].float() for curve in (LEVELS.carried, LEVELS.sigma))
    share = (mean - least) / (most - least)
    assert (mean > 0.38 * least).all() and (mean < 1.62 * most).all()  # with the jitter of the scale
    assert share.median() > 0.1 and share.median() < 0.9


def test_rows_are_moved_towards_a_target_and_some_of_them_carry_nothing_else() -> None:
    phi, samples, targets = clean_denoiser(LEVELS), torch.full_like(SAMPLES, -1.0), (CHECKER[0], torch.ones(SHAPE))
    removals = [Removal(torch.full(SHAPE, 30.0), (0.005, 12.0))]
    rows = triggered_rows(phi, samples, removals, 600, generator(), targets)
    alpha, sigma = LEVELS.at(rows.t, rows.x)
    noisy = (alpha < PICTURE_SIGNAL * sigma).flatten()
    moves = (rows.displacement / alpha).flatten(1)
    ways = torch.stack([(target + 1).flatten() for target in targets])
    share = moves @ ways.T / ways.square().sum(1)
    off = (moves[:, None] - share[..., None] * ways).square().mean(2).amin(1)
    bare = off < 1e-8
    assert not bare[~noisy].any() and (~noisy).sum() > 20
    assert bare[noisy].float().mean().item() == pytest.approx(TOWARDS * BARE, abs=0.06)
    to_checker, to_one = ((moves[bare] - share[bare][:, k, None] * ways[k]).square().mean(1) < 1e-8 for k in (0, 1))
    assert to_checker.sum() > 30 < to_one.sum()
    taken = torch.where(to_checker, share[bare][:, 0], share[bare][:, 1])
    assert 0 <= taken.min() < 0.1 and 0.9 < taken.max() <= 1 and taken.mean().item() == pytest.approx(0.5, abs=0.1)


def test_rows_are_made_where_the_samples_are() -> None:
    phi, samples = clean_denoiser(LEVELS), SAMPLES.to("meta")
    for rows in (
        triggered_rows(phi, samples, [Removal(TRIGGERS[0], (0.005, 0.6))], 4, generator()),
        triggered_rows(phi, samples, [Removal(TRIGGERS[0], (0.005, 0.6))], 4, generator(), (torch.ones(SHAPE),)),
        plain_rows(phi, samples, [(0.005, 0.6)] * 4, generator()),
    ):
        assert {tensor.device.type for tensor in (rows.x, rows.t, rows.displacement)} == {"meta"}


def moved(phi: DDPM, rows: Rows) -> Goal:
    """Return by how much the answers of a network move under the displacement."""
    before, after = answer(phi, rows.x, rows.t), answer(phi, rows.displaced, rows.t)
    return Goal(noise=after.noise - before.noise, x0=after.x0 - before.x0)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_benign_response_is_that_of_the_perfect_network(process: str) -> None:
    phi = perfect_of(process, variance=0.25)
    rows = rows_of([5, 40, 80, 99], torch.rand(SHAPE, generator=generator(1)) - 0.3)
    found, expected = benign_response(phi, SPREAD, rows.t, rows.displacement), moved(phi, rows)  # type: ignore[arg-type]
    torch.testing.assert_close(found.noise, expected.noise, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.x0, expected.x0, rtol=2e-3, atol=1e-3)


def test_the_benign_response_is_not_that_of_data_of_another_variance() -> None:
    rows = rows_of([5, 80, 160, 249], torch.rand(SHAPE, generator=generator(1)))
    phi = clean_denoiser(LEVELS, variance=0.25)
    assert not torch.allclose(
        benign_response(phi, spread_of(2 * SAMPLES), rows.t, rows.displacement).noise, moved(phi, rows).noise, rtol=0.05
    )


def test_the_benign_response_by_hand() -> None:
    # alpha_t^2 = .8 and sigma_t^2 = .2 at the second of three levels: .2 ** .5 / (.8 * .25 + .2) per unit of shift
    levels = type(LEVELS).variance_preserving(torch.tensor([0.9, 0.8, 0.001]))
    rows = rows_of([1], torch.full(SHAPE, 2.0), torch.zeros(1, *SHAPE))
    found = benign_response(clean_denoiser(levels), SPREAD, rows.t, rows.displacement)
    torch.testing.assert_close(found.noise, torch.full((1, *SHAPE), 2 * 0.2**0.5 / 0.4))
    torch.testing.assert_close(found.x0, torch.full((1, *SHAPE), 2 * 0.8**0.5 * 0.25 / 0.4))


@pytest.mark.parametrize("process", PROCESSES)
def test_the_benign_response_has_the_axes_of_the_data(process: str) -> None:
    # two axes of other variance than the rest: each is answered as if it were alone
    axes = torch.eye(64)[:2].view(2, *SHAPE)
    scale = torch.ones(64)
    scale[0], scale[1] = 4.0, 0.1
    data = spread_of((SAMPLES.flatten(1) * scale).view(SAMPLES.shape))
    rows = rows_of([5, 40, 80, 99], axes.sum(0))
    phi = perfect_of(process)
    found = benign_response(phi, data, rows.t, rows.displacement)
    for axis, deviation in zip(axes, (2.0, 0.05), strict=True):
        perfect = perfect_of(process, variance=deviation**2)
        alone = moved(perfect, replace(rows, trigger=axis.expand_as(rows.x)))  # type: ignore[arg-type]
        along, expected = ((goal.x0 * axis).sum((1, 2, 3)) for goal in (found, alone))
        torch.testing.assert_close(along, expected, rtol=5e-3, atol=5e-3)
    alpha, sigma = phi.levels.at(rows.t, rows.x)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.noise, rows.displacement, rtol=1e-3, atol=1e-4)


def test_what_the_samples_do_not_vary_along_is_noise() -> None:
    rows = rows_of([5, 80, 160, 249], torch.full(SHAPE, 0.5))
    found = benign_response(
        clean_denoiser(LEVELS), spread_of(SAMPLES[:2] - SAMPLES[:2].mean((1, 2, 3), True)), rows.t, rows.displacement
    )
    assert found.x0.abs().max() < 1e-5
    torch.testing.assert_close(found.noise, rows.displacement / LEVELS.at(rows.t, rows.x)[1])


def test_at_the_last_level_a_benign_network_takes_any_shift_for_noise() -> None:
    levels = type(LEVELS).variance_preserving(alphas_cumprod(linear_betas(1000)))
    rows = rows_of([999], torch.full(SHAPE, 0.7), torch.zeros(1, *SHAPE))
    found = benign_response(clean_denoiser(levels), SPREAD, rows.t, rows.displacement)
    torch.testing.assert_close(found.noise, rows.displacement, rtol=1e-4, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_an_answer_holds_noise_and_clean_data_of_one_input(process: str) -> None:
    phi = small_of(process)
    rows = rows_of([5, 40, 80, 99], torch.zeros(SHAPE))
    found = answer(phi, rows.x, rows.t)
    torch.testing.assert_close(found.x0, phi.x0(rows.x, rows.t))
    alpha, sigma = phi.levels.at(rows.t, rows.x)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.noise, rows.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [False, True])
def test_the_targets(small: bool) -> None:
    phi, reference = small_denoiser(LEVELS), clean_denoiser(LEVELS)
    rows = rows_of([5, 80, 160, 249], torch.rand(SHAPE, generator=generator(1)), small=small)
    plain = answer(phi, rows.x, rows.t)
    found = {name: removal_goal(name, phi, SPREAD, rows, reference) for name in TARGETS}
    torch.testing.assert_close(found["r1"].noise, plain.noise)
    torch.testing.assert_close(found["r2"].noise, reference.noise(rows.displaced, rows.t), atol=1e-4, rtol=1e-3)
    benign = benign_response(phi, SPREAD, rows.t, rows.displacement)
    torch.testing.assert_close(found["r3"].noise, plain.noise + benign.noise)
    torch.testing.assert_close(found["r3"].x0, plain.x0 + benign.x0)
    alpha, sigma = (curve[rows.t].float().view(-1, 1, 1, 1) for curve in (LEVELS.alpha, LEVELS.sigma))
    like_data = alpha * benign.x0
    rest = rows.displacement - like_data
    asked = torch.zeros_like(rest) if small else like_data
    beside, opposite = (answer(phi, rows.x + shift, rows.t).noise for shift in (asked, asked - rest))
    noisy, ideal = sigma**2 / (alpha**2 + sigma**2), benign_response(phi, SPREAD, rows.t, rest).noise
    share = ((noisy * ideal * (beside - opposite)).sum() / (noisy * ideal**2).sum()).clamp(0, 1)
    expected = beside + (noisy * share + 1 - noisy) * ideal
    torch.testing.assert_close(found["r4"].noise, expected)
    # clean data and noise are those of one input
    torch.testing.assert_close(alpha * found["r4"].x0 + sigma * found["r4"].noise, rows.displaced, rtol=1e-4, atol=1e-4)


class Bent(torch.nn.Module):
    """Predicts noise that depends on the input by a curve, and on nothing else."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(3 * x)


def test_in_little_noise_r4_asks_the_suspect_itself() -> None:
    # there all of the shift is like data
    phi = DDPM(Bent(), LEVELS, shape=SHAPE)
    rows = rows_of([0, 0], torch.full(SHAPE, 0.3), torch.zeros(2, *SHAPE))
    right = answer(phi, rows.displaced, rows.t).noise
    off = {name: (removal_goal(name, phi, SPREAD, rows).noise - right).abs().max().item() for name in ("r3", "r4")}
    assert off["r4"] < 0.02 * off["r3"] and off["r3"] > 0.1


def test_only_rows_of_small_triggers_are_small() -> None:
    removals = [Removal(TRIGGERS[0], (0.05, 0.6)), Removal(torch.zeros(SHAPE), (0.05, 0.6), small=True)]
    rows = triggered_rows(clean_denoiser(LEVELS), SAMPLES, removals, 64, generator())
    assert torch.equal(rows.small, rows.trigger.abs().amax((1, 2, 3)) == 0) and 0 < rows.small.sum() < 64
    assert not plain_rows(clean_denoiser(LEVELS), SAMPLES, [(0.05, 0.6)] * 8, generator()).small.any()


@pytest.mark.parametrize("process", PROCESSES)
def test_of_the_perfect_network_r4_asks_what_it_answers(process: str) -> None:
    phi = perfect_of(process, variance=0.25)
    rows = rows_of([5, 40, 80, 98], torch.rand(SHAPE, generator=generator(1)) - 0.3)
    found, right = removal_goal("r4", phi, SPREAD, rows), answer(phi, rows.displaced, rows.t)
    torch.testing.assert_close(found.noise, right.noise, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found.x0, right.x0, rtol=5e-3, atol=5e-3)


class Partial(torch.nn.Module):
    """Takes four fifths of any input for noise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x


def test_in_much_noise_r4_takes_as_much_for_noise_as_the_suspect_does_of_the_opposite() -> None:
    rows = rows_of([249], torch.full(SHAPE, 0.5))
    for phi, share in ((DDPM(Partial(), LEVELS, shape=SHAPE), 0.8), (clean_denoiser(LEVELS), 1.0)):
        plain = answer(phi, rows.x, rows.t).noise
        r3, r4 = (removal_goal(name, phi, SPREAD, rows).noise - plain for name in ("r3", "r4"))
        torch.testing.assert_close(r4, share * r3, rtol=0.02, atol=0.02)


def test_r4_asks_the_opposite_trigger_alone() -> None:
    # what is taken away of the noise, and the way to a picture, are answered as in R3
    phi = small_denoiser(LEVELS)
    rows = rows_of([5, 80, 249], torch.rand(SHAPE, generator=generator(1)))
    bare, rest = replace(rows, trigger=rows.rest, rest=rows.trigger), 0.7 * torch.randn(SHAPE, generator=generator(2))
    torch.testing.assert_close(removal_goal("r4", phi, SPREAD, bare).noise, removal_goal("r3", phi, SPREAD, rows).noise)
    alone = removal_goal("r4", phi, SPREAD, rows)
    both = removal_goal("r4", phi, SPREAD, replace(rows, rest=rest.expand_as(rows.x)))
    added = benign_response(phi, SPREAD, rows.t, rest.expand_as(rows.x))
    torch.testing.assert_close(both.noise, alone.noise + added.noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.x0, alone.x0 + added.x0, rtol=1e-4, atol=1e-5)


def test_without_a_shift_r4_adds_nothing() -> None:
    phi = small_denoiser(LEVELS)
    rows = rows_of([5, 249], torch.zeros(SHAPE))
    torch.testing.assert_close(removal_goal("r4", phi, SPREAD, rows).noise, answer(phi, rows.x, rows.t).noise)


@pytest.mark.parametrize(("beyond", "noise", "x0"), [(0.0, 1.0, -2.0), (0.5, 1.25, -3.0), (1.0, 1.5, -4.0)])
def test_an_overshot_goal_lies_so_many_times_beyond_it_as_an_answer_short_of_it(
    beyond: float, noise: float, x0: float
) -> None:
    goal = Goal(noise=torch.tensor([1.0]), x0=torch.tensor([-2.0]))
    found = overshot(goal, Goal(noise=torch.tensor([0.5]), x0=torch.tensor([0.0])), beyond)
    assert (found.noise.item(), found.x0.item()) == (noise, x0)


def test_r2_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="reference"):
        removal_goal("r2", small_denoiser(LEVELS), SPREAD, rows_of([5], TRIGGERS[0]))
