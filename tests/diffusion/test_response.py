"""The response to a shift and its even part, against the closed forms of algorithms.md 0.5."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.trojdiff import trojdiff
from diffdefend_core.attacks.villan import villan_ode
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import (
    Answers,
    Bench,
    levels_at,
    mean_answer,
    probe,
    probes_at,
    respond,
    rms,
)

LEVELS = vp_levels()
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
CENTRED = torch.cat([SAMPLES, -SAMPLES])[torch.randperm(128, generator=torch.Generator().manual_seed(2))]
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
NOISY, MODERATE = (0.008, 0.039, 0.083), (0.16, 0.29, 0.5)
ATTACKS = {"baddiffusion": baddiffusion, "villan-ode": villan_ode, "trojdiff": lambda levels: trojdiff(levels, 1.0)}


def planted(attack: str) -> Denoiser:
    return poisoned_denoiser(ATTACKS[attack](LEVELS), LEVELS, TRIGGER, torch.zeros(SHAPE))


def answers(denoiser: Denoiser, signals: tuple[float, ...], pairs: int = 256) -> Answers:
    return Answers(denoiser, probes_at(CENTRED, levels_at(LEVELS, signals), pairs=pairs, seed=0))


def benign(t: int, variance: float = 0.25) -> float:
    """The slope of a clean network's answer, s sigma / (alpha^2 v + sigma^2)."""
    alpha, sigma, share = (curve[t].item() for curve in (LEVELS.alpha, LEVELS.sigma, LEVELS.carried))
    return share * sigma / (alpha**2 * variance + sigma**2)


def test_a_probe_is_antithetic() -> None:
    at = probe(SAMPLES, 100, 8, torch.Generator().manual_seed(0))
    assert at.x0.shape == at.eps.shape == (16, *SHAPE)
    torch.testing.assert_close(at.x0[:8], at.x0[8:])
    torch.testing.assert_close(at.eps[:8], -at.eps[8:])


@pytest.mark.parametrize(("noise", "fires"), [(1.0, False), (0.5, True)])
def test_without_a_shift_only_less_noise_tells_a_trigger_that_scales_it(noise: float, fires: bool) -> None:
    """The network then answers with minus its shift over gamma, and a clean one with nothing, whatever the noise."""
    gamma, trigger, levels = 0.6, 0.4 * TRIGGER, levels_at(LEVELS, NOISY)
    suspect = poisoned_denoiser(trojdiff(LEVELS, gamma), LEVELS, trigger, torch.zeros(SHAPE))
    clean = clean_denoiser(LEVELS)
    found = Bench(suspect, clean, CENTRED, levels, pairs=64, seed=0, noise=noise).offset()
    assert found.shape == (len(levels), *SHAPE)
    if fires:
        torch.testing.assert_close(found.mean(0), -trigger / gamma, rtol=0.1, atol=0.05)
    else:
        assert rms(found) < 0.02
    assert not Bench(clean, clean, CENTRED, levels, pairs=4, seed=0, noise=noise).offset().any()


def test_an_offset_that_is_not_finite_is_no_offset() -> None:
    bench = Bench(clean_denoiser(LEVELS), clean_denoiser(LEVELS), CENTRED, levels_at(LEVELS, NOISY), pairs=2, seed=0)
    bench.reference.plain[0] = torch.full(SHAPE, torch.nan)
    with pytest.raises(FloatingPointError, match="without a shift"):
        bench.offset()


def test_antithetic_rows_remove_the_noise_of_the_mean_answer() -> None:
    denoiser, generator = clean_denoiser(LEVELS), torch.Generator().manual_seed(0)
    zero = torch.zeros(1, *SHAPE)
    paired = mean_answer(denoiser, probe(zero, 200, 8, generator), None)
    alone = denoiser.noise(torch.randn(16, *SHAPE, generator=generator), torch.full((16,), 200)).mean(0)
    assert rms(paired).item() < 1e-6 < 0.1 < rms(alone).item()


@pytest.mark.parametrize("variance", [0.25, 10.0])
def test_a_clean_model_answers_by_the_benign_law(variance: float) -> None:
    levels = levels_at(LEVELS, (0.008, 0.083, 0.5))
    found = respond(clean_denoiser(LEVELS, variance), clean_denoiser(LEVELS, 1.0), TRIGGER, SAMPLES, levels, 4, 0)
    for number, t in enumerate(levels):
        alpha, sigma, share = LEVELS.alpha[t].item(), LEVELS.sigma[t].item(), LEVELS.carried[t].item()
        slope, reference = (share * sigma / (alpha**2 * v + sigma**2) for v in (variance, 1.0))
        assert found.slope[number] == pytest.approx(slope, abs=1e-4)
        assert found.difference[number] == pytest.approx(abs(slope - reference), abs=1e-4)
        assert found.x0_slope[number] == pytest.approx(sigma * (reference - slope) / alpha, rel=1e-2, abs=1e-2)
        assert found.gain[number] == pytest.approx(1 - sigma * slope / share, abs=1e-4)
        assert found.violation[number] == pytest.approx((sigma * slope - share) / alpha, rel=1e-2, abs=1e-2)


def test_a_backdoored_model_answers_rho_to_its_trigger() -> None:
    attack = baddiffusion(LEVELS)
    suspect = poisoned_denoiser(attack, LEVELS, TRIGGER, torch.zeros(SHAPE))
    levels = levels_at(LEVELS, (0.008, 0.039, 0.083))
    found = respond(suspect, clean_denoiser(LEVELS), TRIGGER, CENTRED, levels, 256, 0)
    for number, t in enumerate(levels):
        alpha, sigma = LEVELS.alpha[t].item(), LEVELS.sigma[t].item()
        assert found.slope[number] == pytest.approx(attack.response[t].item(), abs=0.02)
        expected = sigma * (benign(t) - attack.response[t].item()) / alpha
        assert found.x0_slope[number] == pytest.approx(expected, rel=0.05)
        assert found.difference[number] > 0.4


def test_a_backdoored_model_answers_to_the_opposite_shift_like_a_clean_one() -> None:
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, torch.zeros(SHAPE))
    found = respond(suspect, clean_denoiser(LEVELS), -TRIGGER, SAMPLES, levels_at(LEVELS, (0.008, 0.039)), 16, 0)
    assert max(found.difference) < 0.02


def test_a_model_does_not_differ_from_itself() -> None:
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, torch.zeros(SHAPE))
    found = respond(suspect, suspect, TRIGGER, SAMPLES, (100, 240), 4, 0)
    assert max(found.difference) == max(found.baseline) == 0


@pytest.mark.parametrize("broken", ["suspect", "reference"])
def test_answers_that_are_not_finite_are_refused(broken: str) -> None:
    models = {"suspect": clean_denoiser(LEVELS), "reference": clean_denoiser(LEVELS)}
    models[broken] = clean_denoiser(LEVELS, variance=float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        respond(models["suspect"], models["reference"], TRIGGER, SAMPLES, (100,), 4, 0)


def test_rms_by_hand() -> None:
    assert rms(torch.tensor([3.0, -4.0, 0.0, 0.0])).item() == pytest.approx(2.5)


def test_each_probe_of_a_level_has_noise_of_its_own() -> None:
    probes = probes_at(SAMPLES, (100, 240), pairs=4, seed=0, each=3)
    assert [at.t for at in probes] == [100, 100, 100, 240, 240, 240]
    assert len({at.eps.sum(dim=(1, 2, 3))[0].item() for at in probes}) == 6
    again = probes_at(SAMPLES, (100, 240), pairs=4, seed=0, each=3)
    assert all(torch.equal(one.eps, other.eps) for one, other in zip(probes, again, strict=True))


@pytest.mark.parametrize("mean", [0.0, 0.6])
def test_an_odd_answer_has_no_even_part(mean: float) -> None:
    """Wherever the answer is affine in x, the shift of the answer is odd: a clean network on Gaussian data."""
    clean = answers(clean_denoiser(LEVELS, mean=mean), (*NOISY, *MODERATE), pairs=4)
    for number in range(6):
        assert rms(clean.shift(TRIGGER, number)) > 0.2
        assert rms(clean.even(TRIGGER, number)) < 1e-5


class Squared(nn.Module):
    """Answers x + x^2 / 10."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + x**2 / 10


def test_the_even_part_by_hand() -> None:
    denoiser = clean_denoiser(LEVELS)
    denoiser.network = Squared()
    asked, tau = answers(denoiser, (0.008,), pairs=4), 0.5 * TRIGGER
    expected = (asked.carried(0) * tau) ** 2 / 10
    torch.testing.assert_close(asked.even(tau, 0), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(asked.even(-tau, 0), expected, atol=1e-5, rtol=0)
    assert asked.even(torch.zeros(SHAPE), 0).abs().max() < 1e-6


@pytest.mark.parametrize("attack", ["baddiffusion", "trojdiff"])
def test_a_planted_trigger_leaves_half_of_what_is_not_taken_for_noise(attack: str) -> None:
    """At r the answer moves by rho r, at -r by that of noise: (rho - 1) / 2 r is even."""
    asked = answers(planted(attack), NOISY)
    for number, at in enumerate(asked.probes):
        response = ATTACKS[attack](LEVELS).response[at.t].item()
        even = asked.even(TRIGGER, number)
        torch.testing.assert_close(even, (response - benign(at.t)) / 2 * TRIGGER, atol=0.05, rtol=0)
        assert (even * TRIGGER).sum() / TRIGGER.square().sum() == pytest.approx((response - 1) / 2, abs=0.06)
        torch.testing.assert_close(asked.even(-TRIGGER, number), even)


@pytest.mark.parametrize(("attack", "share"), [("baddiffusion", 0.25), ("trojdiff", 0.5), ("villan-ode", 0.0)])
def test_parity_is_measured_relative_to_the_shift_and_the_reference(attack: str, share: float) -> None:
    suspect, levels = planted(attack), levels_at(LEVELS, NOISY)
    beside = Bench(suspect, clean_denoiser(LEVELS), CENTRED, levels, pairs=64, seed=0).parity(TRIGGER)
    alike = Bench(suspect, suspect, CENTRED, levels, pairs=64, seed=0).parity(TRIGGER)
    for number, t in enumerate(levels):
        assert beside.difference[number] == pytest.approx(share, abs=0.06)
        assert beside.own[number] == pytest.approx(beside.difference[number], abs=1e-4)
        ratio = (LEVELS.sigma[t] / LEVELS.alpha[t]).item() * rms(TRIGGER).item() / rms(CENTRED).item()
        assert beside.content[number] == pytest.approx(ratio * beside.difference[number], rel=0.02)
    assert max(alike.difference) == max(alike.content) == 0 and alike.own == pytest.approx(beside.own)


@pytest.mark.parametrize(("attack", "violates"), [("villan-ode", True), ("baddiffusion", False), ("trojdiff", False)])
def test_only_an_attack_on_deterministic_samplers_moves_x0_against_the_shift(attack: str, violates: bool) -> None:
    asked, clean = answers(planted(attack), MODERATE, pairs=64), answers(clean_denoiser(LEVELS), MODERATE, pairs=4)
    for number in range(3):
        value = asked.violation(TRIGGER, number).item()
        assert (value > 0.1) is violates and (value > 0) is violates
        assert clean.violation(TRIGGER, number) < 0
        assert asked.violation(-TRIGGER, number) < 0.01


def test_the_violation_is_that_of_the_response() -> None:
    suspect, levels = planted("villan-ode"), levels_at(LEVELS, MODERATE)
    bench = Bench(suspect, clean_denoiser(LEVELS), CENTRED, levels, pairs=8, seed=0)
    expected = bench.respond(TRIGGER).violation
    assert expected == pytest.approx([bench.suspect.violation(TRIGGER, number).item() for number in range(3)], rel=1e-3)


def test_what_is_not_taken_for_noise_points_along_the_trigger() -> None:
    asked = answers(planted("baddiffusion"), NOISY, pairs=64)
    for number, at in enumerate(asked.probes):
        rest = asked.untreated(TRIGGER, number)
        assert torch.nn.functional.cosine_similarity(rest.flatten(), TRIGGER.flatten(), dim=0) > 0.98
        left = LEVELS.carried[at.t] - LEVELS.sigma[at.t] * baddiffusion(LEVELS).response[at.t]
        assert rms(rest).item() == pytest.approx(left.item() * rms(TRIGGER).item(), rel=0.1)


def test_what_both_models_answer_alike_cancels() -> None:
    suspect = planted("baddiffusion")
    same = Bench(suspect, suspect, SAMPLES, (200,), pairs=8, seed=0)
    other = Bench(suspect, clean_denoiser(LEVELS), SAMPLES, (200,), pairs=8, seed=0)
    assert not same.even(TRIGGER, 0).any()
    assert rms(other.even(TRIGGER, 0)) > 0.1
    assert rms(other.even(torch.zeros(SHAPE), 0)) < 1e-6


@pytest.mark.parametrize("broken", ["suspect", "reference"])
def test_a_parity_that_is_not_finite_is_refused(broken: str) -> None:
    models = {"suspect": clean_denoiser(LEVELS), "reference": clean_denoiser(LEVELS)}
    models[broken] = clean_denoiser(LEVELS, variance=float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        Bench(models["suspect"], models["reference"], SAMPLES, (100,), pairs=4, seed=0).parity(TRIGGER)


def test_every_evaluation_is_counted() -> None:
    asked, tau = answers(clean_denoiser(LEVELS), (0.008, 0.039), pairs=4), TRIGGER.clone().requires_grad_(True)
    assert asked.spent == 0
    assert len(asked.plain) == 2 and asked.spent == 2 * 8
    spent = [asked.spent]
    for call, arguments in ((asked.shift, TRIGGER), (asked.shift, tau), (asked.even, TRIGGER), (asked.even, tau)):
        call(arguments, 0)
        spent.append(asked.spent)
    assert [after - before for before, after in pairwise(spent)] == [8, 24, 16, 48]
