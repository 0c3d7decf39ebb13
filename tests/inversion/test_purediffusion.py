"""PureDiffusion: lambda_t in closed form, and one shift for several levels."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, levels_of, poisoned_denoiser, small_of, vp_levels

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import deterministic_response, stochastic_response
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.elijah import start_shift
from diffdefend_core.inversion.invert import Inversion
from diffdefend_core.inversion.purediffusion import invert, scale
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.options import PureDiffusionOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
BOX = trigger("box", 8)
SHORT = PureDiffusionOptions(iterations=3, batch=2)


def planted() -> Denoiser:
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, BOX, TARGET)
    suspect.network.prior.fill_(16.0)  # the network switches at a quarter of the trigger, not at half
    return suspect


def inverted(suspect: Denoiser, options: PureDiffusionOptions, seed: int = 0) -> Inversion:
    return invert(suspect, "a" * 64, options, seed=seed, progress=silent)


def test_a_planted_trigger_is_found_by_the_family_of_its_attack() -> None:
    suspect = planted()
    found = inverted(suspect, PureDiffusionOptions(starts=("negative", "positive")))
    assert found.record.best == "negative/sde"
    assert cosine(start_shift("negative", suspect, 0), BOX) < 0.87
    assert cosine(found.triggers["negative/sde"], BOX) > 0.95
    assert abs(cosine(found.triggers["negative/ode"], BOX)) < 0.95


def test_on_a_clean_model_the_shift_vanishes() -> None:
    found = inverted(clean_denoiser(LEVELS), PureDiffusionOptions(families=("sde",)))
    assert found.record.candidates[0].rms < 0.1


@pytest.mark.parametrize("process", PROCESSES)
def test_the_closed_forms_are_those_of_the_attacks(process: str) -> None:
    levels = levels_of(process)
    for family, exact in (("sde", stochastic_response), ("ode", deterministic_response)):
        expected = exact(levels, levels.carried)
        for t in (2, 50, 98):
            assert scale(levels, t, family) == pytest.approx(expected[t].item(), rel=1e-6)


def test_golden_responses_of_the_linear_schedule() -> None:
    levels = vp_levels(1000)
    assert scale(levels, 999, "sde") == pytest.approx(0.5025, abs=1e-4)
    assert scale(levels, 999, "ode") == pytest.approx(1.0, abs=1e-3)
    sigma, ratio = levels.sigma[700], levels.alpha[700] / levels.alpha[699]
    assert scale(levels, 700, "sde") == pytest.approx((sigma / (1 + ratio)).item(), rel=1e-9)


def test_the_last_level_of_a_flow_has_no_signal_and_still_a_response() -> None:
    levels = levels_of("flow")
    assert levels.alpha[-1] == 0
    assert scale(levels, 99, "sde") == scale(levels, 99, "ode") == 1


@pytest.mark.parametrize("process", PROCESSES)
def test_the_evaluations_that_are_claimed_are_those_that_were_made(process: str) -> None:
    suspect, spent = small_of(process, shape=(3, 8, 8)), []
    suspect.network.register_forward_hook(lambda _, __, out: spent.append(len(out) * (3 if out.requires_grad else 1)))
    found = inverted(suspect, SHORT)
    assert found.record.forward_equivalents == sum(spent) == (1 + 3 * 2 * 3) * 4 * 2


def test_the_record_is_complete_and_reproducible() -> None:
    suspect = small_of("vp", steps=1000)
    first, again, other = inverted(suspect, SHORT), inverted(suspect, SHORT), inverted(suspect, SHORT, seed=1)
    assert first.record == again.record != other.record
    assert InvertedTrigger.from_json(first.record.to_json()) == first.record
    assert first.record.timesteps == (999, 949, 899, 799)
    assert [item.name for item in first.record.candidates] == ["negative/sde", "negative/ode"]
    for item in first.record.candidates:
        assert len(item.response) == 4 and len(item.loss) == 3
    assert first.reference is None


@pytest.mark.parametrize(
    ("process", "options"),
    [
        ("vp", PureDiffusionOptions(levels=(1.5,))),
        ("vp", PureDiffusionOptions(levels=(0.0,))),
        ("vp", PureDiffusionOptions(levels=())),
        ("flow", PureDiffusionOptions(levels=(1.0,))),
    ],
)
def test_levels_that_do_not_fit_are_refused(process: str, options: PureDiffusionOptions) -> None:
    with pytest.raises(InputError, match="of a model with 100; expected shares"):
        inverted(small_of(process), options)


@pytest.mark.parametrize("options", [PureDiffusionOptions(families=("pde",)), PureDiffusionOptions(starts=("up",))])
def test_unknown_families_and_starts_are_refused(options: PureDiffusionOptions) -> None:
    with pytest.raises(InputError, match="correct the setting"):
        inverted(small_of("vp"), options)


def test_a_model_whose_answers_are_no_numbers_is_refused() -> None:
    suspect = small_of("vp")
    suspect.network.outer.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        inverted(suspect, SHORT)
