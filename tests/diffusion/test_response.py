"""The response to a shift, against the closed forms of algorithms.md 0.5."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.response import levels_at, mean_answer, probe, respond, rms

LEVELS = vp_levels()
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)


def test_a_probe_is_antithetic() -> None:
    at = probe(SAMPLES, 100, 8, torch.Generator().manual_seed(0))
    assert at.x0.shape == at.eps.shape == (16, *SHAPE)
    torch.testing.assert_close(at.x0[:8], at.x0[8:])
    torch.testing.assert_close(at.eps[:8], -at.eps[8:])


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


def test_a_backdoored_model_answers_rho_to_its_trigger() -> None:
    attack = baddiffusion(LEVELS)
    suspect = poisoned_denoiser(attack, LEVELS, TRIGGER, torch.zeros(SHAPE))
    levels = levels_at(LEVELS, (0.008, 0.039, 0.083))
    centred = torch.cat([SAMPLES, -SAMPLES])[torch.randperm(128, generator=torch.Generator().manual_seed(2))]
    found = respond(suspect, clean_denoiser(LEVELS), TRIGGER, centred, levels, 256, 0)
    for number, t in enumerate(levels):
        alpha, sigma = LEVELS.alpha[t].item(), LEVELS.sigma[t].item()
        assert found.slope[number] == pytest.approx(attack.response[t].item(), abs=0.02)
        expected = (
            sigma * (LEVELS.carried[t].item() * sigma / (0.25 * alpha**2 + sigma**2) - attack.response[t]) / alpha
        )
        assert found.x0_slope[number] == pytest.approx(expected.item(), rel=0.05)
        assert found.difference[number] > 0.4
    cosine = torch.nn.functional.cosine_similarity(found.untreated.flatten(), TRIGGER.flatten(), dim=0)
    assert cosine > 0.99


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
