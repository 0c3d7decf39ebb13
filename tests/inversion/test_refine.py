"""From a direction to the trigger: shape by the fixed point, norm by the switch, on networks in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, poisoned_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.trojdiff import trojdiff
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Answers, levels_at, probes_at, rms
from diffdefend_core.inversion.refine import align, cosine, switching_norm
from diffdefend_core.options import InversionOptions

LEVELS = vp_levels()
NOISY = levels_at(LEVELS, (0.012, 0.03, 0.065))
NORMS = InversionOptions().norms
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
CLEAN = clean_denoiser(LEVELS)
PATTERN = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.6, -1.0, 0.8)


ATTACKS = {"sde": baddiffusion(LEVELS), "troj": trojdiff(LEVELS, 1.0)}


def planted(shift: Tensor, attack: str = "sde") -> Denoiser:
    return poisoned_denoiser(ATTACKS[attack], LEVELS, shift, TARGET)


def of_norm(norm: float) -> Tensor:
    return norm * PATTERN / rms(PATTERN)


def beside(shift: Tensor, similarity: float, norm: float) -> Tensor:
    """Return a shift of rms `norm` whose cosine to `shift` is `similarity`."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    noise -= (noise * shift).sum() / shift.square().sum() * shift
    direction = similarity * shift / rms(shift) + (1 - similarity**2) ** 0.5 * noise / rms(noise)
    return norm * direction / rms(direction)


def answers(suspect: Denoiser, pairs: int) -> Answers:
    return Answers(suspect, probes_at(SAMPLES, NOISY, pairs=pairs, seed=0))


def aligned(suspect: Denoiser, tau: Tensor) -> Tensor:
    return align(answers(suspect, 16), tau)


@pytest.mark.parametrize("similarity", [0.7, 0.9])
@pytest.mark.parametrize("attack", ["sde", "troj"])
def test_a_shift_that_fires_turns_to_the_trigger(similarity: float, attack: str) -> None:
    shift = of_norm(0.8)
    tau = beside(shift, similarity, norm=0.8)
    found = aligned(planted(shift, attack), tau)
    assert cosine(tau, shift) == pytest.approx(similarity, abs=1e-3)
    assert cosine(found, shift) > 0.99
    assert rms(found).item() == pytest.approx(0.8, rel=1e-4)


def test_a_shift_that_does_not_fire_stays() -> None:
    shift = of_norm(0.8)
    tau = beside(shift, -0.7, norm=0.8)
    assert cosine(aligned(planted(shift), tau), shift) < 0


def test_a_clean_model_turns_a_shift_nowhere() -> None:
    tau = beside(PATTERN, 0.7, norm=0.8)
    assert cosine(aligned(CLEAN, tau), tau) > 0.99


@pytest.mark.parametrize("norm", [0.5, 0.8, 1.1])
def test_the_norm_is_twice_that_of_the_switch(norm: float) -> None:
    shift = of_norm(norm)
    found = switching_norm(answers(planted(shift), 32), PATTERN / rms(PATTERN), NORMS)
    assert found == pytest.approx(norm, rel=0.1)


def test_a_clean_model_has_no_switch_but_a_norm_that_was_tried() -> None:
    # what is even in its answers is rounding
    found = switching_norm(answers(CLEAN, 8), PATTERN / rms(PATTERN), NORMS)
    assert 2 * NORMS[0] <= found <= 2 * NORMS[-1]


def test_without_any_even_answer_the_first_norm_counts() -> None:
    suspect = clean_denoiser(LEVELS)
    suspect.network.forward = lambda x, t: torch.zeros_like(x)
    assert switching_norm(answers(suspect, 8), PATTERN / rms(PATTERN), NORMS) == 2 * NORMS[0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("above", [0.5, 0.9])
def test_answers_that_are_not_finite_at_some_norm_are_refused(broken: float, above: float) -> None:
    suspect, direction = planted(of_norm(0.8)), PATTERN / rms(PATTERN)
    asked, answer = answers(suspect, 8), suspect.network.forward

    def overflowing(x: Tensor, t: Tensor) -> Tensor:
        along = (x * direction).mean(dim=(1, 2, 3), keepdim=True)
        return torch.where(along > above, broken, answer(x, t))

    suspect.network.forward = overflowing
    with pytest.raises(FloatingPointError, match="not finite"):
        switching_norm(asked, direction, NORMS)


def test_a_switch_below_the_first_norm_is_put_there() -> None:
    direction = PATTERN / rms(PATTERN)
    found = switching_norm(answers(planted(of_norm(0.2)), 8), direction, (0.6, 1.0))
    assert found == 2 * 0.6


def test_cosines_by_hand() -> None:
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    assert cosine(a, 3 * a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(a, b) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("process", PROCESSES)
def test_only_a_network_that_predicts_noise_turns_a_shift(process: str) -> None:
    """What a network that answers clean data leaves of a shift is the picture that it paints."""
    denoiser, tau = small_of(process), of_norm(0.5)
    level = levels_at(denoiser.levels, (0.05,))
    found = align(Answers(denoiser, probes_at(SAMPLES, level, pairs=4, seed=0)), tau)
    assert torch.equal(found, tau) is (process in ("flow", "consistency"))
