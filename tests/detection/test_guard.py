"""The guard of one noise: closed forms, drawn noise, and noise that one test sees and another does not."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from diffdefend_core.detection.guard import Guard, kolmogorov_smirnov, noise_tests
from diffdefend_core.errors import InputError

SHAPE = (1, 8, 8)
CIFAR = (3, 32, 32)


def drawn(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def of_norm(norm: float, seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    direction = drawn(1, shape, seed)[0]
    return direction * norm / direction.norm()


def signs(shape: tuple[int, ...] = CIFAR) -> Tensor:
    """An invisible pattern: -.2 and .2 in turn, of zero mean."""
    return 0.2 * (1 - 2 * (torch.arange(math.prod(shape)) % 2).float()).view(shape)


def test_the_matched_filter_flags_the_chosen_share_of_clean_noise() -> None:
    guard = Guard.matched(of_norm(11), 0.01)
    scores, flags = guard(drawn(20_000))
    assert flags.float().mean().item() == pytest.approx(0.01, abs=0.0025)
    assert scores.mean().item() == pytest.approx(0, abs=0.03) and scores.std().item() == pytest.approx(1, abs=0.02)
    assert guard.false_positive_rate() == pytest.approx(0.01)


def test_an_exact_trigger_is_never_missed_and_its_negative_never_flagged() -> None:
    trigger = of_norm(11)
    guard = Guard.matched(trigger, 0.01)
    assert guard(drawn(20_000) + trigger).flags.all()
    assert not guard(drawn(20_000) - trigger).flags.any()


def test_the_score_is_the_projection_on_the_trigger_in_standard_deviations() -> None:
    trigger = torch.zeros(SHAPE)
    trigger[0, 0, :2] = torch.tensor([3.0, 4.0])
    noise = torch.zeros(2, *SHAPE)
    noise[0, 0, 0, :2], noise[1, 0, 5, 5] = torch.tensor([1.0, 2.0]), 9.0
    scores, flags = Guard.matched(trigger, 0.025)(noise)
    assert scores.tolist() == pytest.approx([2.2, 0.0]) and flags.tolist() == [True, False]


def test_a_matched_filter_does_not_see_the_length_of_its_trigger() -> None:
    noise, trigger = drawn(50) + of_norm(3), of_norm(3)
    torch.testing.assert_close(Guard.matched(trigger, 0.01)(noise), Guard.matched(7 * trigger, 0.01)(noise))


@pytest.mark.parametrize("rate", [1e-3, 1e-9, 0.4])
def test_the_threshold_is_the_quantile_of_the_normal_distribution(rate: float) -> None:
    assert Guard.matched(of_norm(2), rate).threshold == pytest.approx(scipy.stats.norm.isf(rate))


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_the_expected_miss_rate_is_that_of_drawn_noise(gamma: float) -> None:
    found, aside = of_norm(1), of_norm(1, seed=2)
    aside = aside - (aside * found).sum() * found
    true = 4 * (0.6 * found + 0.8 * aside / aside.norm())
    guard = Guard.matched(9 * found, 0.05)
    missed = 1 - guard(gamma * drawn(20_000) + true).flags.float().mean().item()
    expected = guard.expected_miss_rate(norm=4, cosine=0.6, gamma=gamma)
    assert missed == pytest.approx(expected, abs=0.012)
    assert expected == pytest.approx(scipy.stats.norm.cdf((1.6449 - 2.4) / gamma), abs=1e-4)


def test_the_likelihood_ratio_of_the_weakest_invisible_trigger_errs_once_in_70_million() -> None:
    trigger = torch.full(CIFAR, 0.2)
    guard = Guard.likelihood(trigger)
    assert trigger.norm().item() == pytest.approx(11.085, abs=1e-3)
    assert guard.false_positive_rate() == pytest.approx(1.5e-8, rel=0.03)
    assert guard.expected_miss_rate(norm=11.085) == pytest.approx(1.5e-8, rel=0.03)


def test_a_likelihood_ratio_with_too_long_a_trigger_loses_inputs() -> None:
    true = of_norm(6)
    exact, long = Guard.likelihood(true), Guard.likelihood(2.2 * true)
    noise = drawn(5000) + true
    assert exact(noise).flags.float().mean() > 0.99
    missed = 1 - long(noise).flags.float().mean().item()
    assert missed == pytest.approx(long.expected_miss_rate(norm=6), abs=0.02) and missed > 0.7


def test_gamma_is_a_standard_deviation() -> None:
    """log N(1; .5, .25) - log N(1; 0, 1) = -log .5 - .25 / .5 + .5; with .5 as the variance it is .5966."""
    guard = Guard.likelihood(torch.full((1, 1, 1), 0.5), 0.5)
    assert guard(torch.ones(1, 1, 1, 1)).scores.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("gamma", [1.0, 0.6, torch.linspace(0.1, 1.5, 64).view(SHAPE), torch.full(SHAPE, 0.6)])
def test_the_likelihood_ratio_is_that_of_two_normal_distributions(gamma: Tensor | float) -> None:
    noise, trigger = drawn(20), of_norm(4)
    normal = torch.distributions.Normal
    expected = (normal(trigger, gamma).log_prob(noise) - normal(0.0, 1.0).log_prob(noise)).sum((1, 2, 3))
    scores, flags = Guard.likelihood(trigger, gamma)(noise)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(flags, expected > 0)


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_a_rate_bounds_the_false_positives_of_a_likelihood_ratio(gamma: float) -> None:
    weak = of_norm(1.5)
    share = [Guard.likelihood(weak, gamma, rate)(drawn(20_000)).flags.float().mean().item() for rate in (None, 0.05)]
    assert share[0] > 0.15 and share[1] <= 0.05


def test_a_faint_trigger_in_weaker_noise_is_seen_by_the_likelihood_ratio_alone() -> None:
    trigger = of_norm(2, shape=CIFAR)
    triggered = 0.6 * drawn(100, CIFAR) + trigger
    assert Guard.matched(trigger, 1e-3)(triggered).flags.float().mean() < 0.2
    ratio = Guard.likelihood(trigger, 0.6, 1e-3)
    assert ratio(triggered).flags.all() and not ratio(drawn(100, CIFAR)).flags.any()


@pytest.mark.parametrize("gamma", [None, torch.linspace(0.5, 1.5, 64).view(SHAPE)])
def test_dtype_layout_and_batch_change_nothing(gamma: Tensor | None) -> None:
    guard = Guard.matched(of_norm(5), 0.01) if gamma is None else Guard.likelihood(of_norm(5), gamma)
    noise = drawn(6).half()
    scores = guard(noise.float()).scores
    assert scores.dtype == torch.float32
    laid_out = noise.double().expand(-1, 2, -1, -1)[:, :1].contiguous(memory_format=torch.channels_last)
    for same in (noise, noise.double(), laid_out):
        torch.testing.assert_close(guard(same).scores, scores)
    torch.testing.assert_close(torch.cat([guard(row[None]).scores for row in noise.float()]), scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_flagged(bad: float) -> None:
    noise = drawn(2)
    noise[1, 0, 3, 3] = bad
    for guard in (Guard.matched(of_norm(4), 1e-6), Guard.likelihood(of_norm(4), 0.5, 1e-6)):
        assert guard(noise).flags.tolist() == [False, True]


def test_a_guard_moves_with_its_tensors() -> None:
    guard = Guard.likelihood(of_norm(4), 0.5)
    moved = guard.to("meta")
    assert moved.quadratic is not None and moved.quadratic.device.type == moved.linear.device.type == "meta"
    assert (moved.threshold, moved.constant, moved.shape) == (guard.threshold, guard.constant, guard.shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 1, 8, 9), (2, 64), (2, 3, 8, 8)])
def test_noise_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape of the trigger"):
        Guard.matched(of_norm(4), 0.01)(torch.zeros(shape))


@pytest.mark.parametrize(
    "trigger", [torch.zeros(SHAPE), torch.full(SHAPE, math.nan), torch.full(SHAPE, math.inf), torch.ones(64)]
)
def test_a_trigger_that_is_none_is_refused(trigger: Tensor) -> None:
    with pytest.raises(InputError, match="not all zero"):
        Guard.matched(trigger, 0.01)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf, torch.ones(8, 8), torch.zeros(SHAPE)])
def test_a_gamma_that_is_no_deviation_is_refused(gamma: Tensor | float) -> None:
    with pytest.raises(InputError, match="standard deviation"):
        Guard.likelihood(of_norm(4), gamma)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match="false-positive rate"):
        Guard.matched(of_norm(4), rate)


def test_a_ratio_with_a_quadratic_part_has_no_closed_error_rate() -> None:
    with pytest.raises(InputError, match="measure the rate"):
        Guard.likelihood(of_norm(4), 0.5).expected_miss_rate(norm=4)


@pytest.mark.parametrize(("shape", "method"), [((2, 7, 9), "exact"), ((1, 110, 110), "asymp")])
def test_each_p_value_is_that_of_scipy(shape: tuple[int, ...], method: str) -> None:
    noise, size = (1 + 0.3 / shape[1]) * drawn(4, shape) + 0.3 / shape[1], math.prod(shape)
    tests = noise_tests(noise)
    for row, mean, norm, distribution in zip(
        noise.double().flatten(1), tests.mean, tests.norm, tests.distribution, strict=True
    ):
        z = row.mean().item() * math.sqrt(size)
        assert mean.item() == pytest.approx(2 * scipy.stats.norm.sf(abs(z)))
        law, energy = scipy.stats.chi2(size), row.square().sum().item()
        assert norm.item() == pytest.approx(2 * min(law.cdf(energy), law.sf(energy)))
        theirs = scipy.stats.kstest(row.numpy(), "norm", method=method)
        assert kolmogorov_smirnov(row[None]).item() == pytest.approx(theirs.statistic)
        assert distribution.item() == pytest.approx(theirs.pvalue)


def test_p_values_of_clean_noise_are_even() -> None:
    tests = noise_tests(drawn(1500))
    for values in (tests.mean, tests.norm, tests.distribution):
        assert scipy.stats.kstest(values.numpy(), "uniform").pvalue > 0.001
    assert 0.02 < (tests.combined <= 0.05).float().mean().item() <= 0.06
    assert tests.combined.max() == 1


def test_the_shift_of_a_visible_trigger_is_seen_by_the_mean() -> None:
    """BadDiffusion's box shifts the mean by .81 per pixel."""
    tests = noise_tests(drawn(20, CIFAR) - 0.81)
    assert tests.mean.max() < 1e-100 and tests.combined.max() < 1e-100


def test_an_invisible_pattern_passes_the_noise_tests_and_not_the_matched_filter() -> None:
    noise, pattern = drawn(50, CIFAR), signs()
    assert pattern.mean().item() == 0
    tests = noise_tests(noise + pattern)
    assert (tests.mean <= 0.001).sum() == 0 and (tests.combined <= 0.001).float().mean() < 0.2
    guard = Guard.matched(pattern, 0.001)
    assert guard(noise + pattern).flags.all() and guard(noise).flags.sum() <= 1


def test_weaker_and_stronger_noise_is_seen_by_the_norm() -> None:
    tests = noise_tests(torch.cat([0.9 * drawn(5, CIFAR), 1.1 * drawn(5, CIFAR)]))
    assert tests.norm.max() < 1e-6 < tests.mean.min()


def test_noise_of_right_mean_and_norm_is_seen_by_its_distribution() -> None:
    coins = drawn(5, CIFAR).sign()
    tests = noise_tests(coins)
    assert tests.norm.min() > 0.5 and tests.mean.min() > 1e-3 and tests.combined.max() < 1e-100


@pytest.mark.parametrize("noise", [torch.zeros(8, 8), torch.zeros(0, 1, 8, 8), torch.full((1, 1, 8, 8), math.nan)])
def test_what_is_not_noise_is_not_tested(noise: Tensor) -> None:
    with pytest.raises(InputError, match="finite numbers"):
        noise_tests(noise)
