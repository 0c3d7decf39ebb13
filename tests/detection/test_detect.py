"""Measuring and judging: a planted model, its clean control, and who vouches for whom."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate, Verdict, Word
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.detection import Calibration, CleanModel, Measurement, judge, measure
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import levels_at, respond
from diffdefend_core.options import DetectionOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
OPTIONS = DetectionOptions(samples=8, stochastic_steps=250, deterministic_steps=20)
PLANTED = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)
REFERENCE = clean_denoiser(LEVELS, variance=0.26)
ORDINARY = {"twin_response": -4.0, "x0_response": -2.5, "moderate_response": -3.9, "violation": -2.3, "uniformity": 0.0,
            "total_variation": 0.0}  # fmt: skip


def inverted(suspect: Denoiser, digest: str = "a" * 64) -> InvertedTrigger:
    samples = 0.5 * torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    levels = levels_at(LEVELS, (0.008, 0.039, 0.16))
    response = respond(suspect, REFERENCE, TRIGGER, samples, levels, 16, 0)
    best = TriggerCandidate(
        name="found",
        rms=0.8,
        difference=sum(response.difference) / 3,
        moderate_difference=0.02,
        violation=max(response.violation),
        gain=sum(response.gain) / 3,
        response=response.slope,
        x0_response=response.x0_slope,
        loss=(1.0,),
    )
    other = dataclasses.replace(best, name="other", difference=0.0)
    return InvertedTrigger(
        model_digest=digest,
        method="diffdefend",
        seed=5,
        timesteps=levels,
        candidates=(other, best),
        best="found",
        forward_equivalents=100,
    )


def calibration(count: int = 9, family: str = "ddpm") -> Calibration:
    models = tuple(
        CleanModel(name=f"clean-{n}", digest=f"{n:064x}", family=family, shape=SHAPE, statistics=ORDINARY)
        for n in range(count)
    )
    return Calibration(name="tests", options_digest="f" * 64, models=models)


def measured(suspect: Denoiser) -> Measurement:
    triggers = {"found": TRIGGER, "other": torch.zeros(SHAPE)}
    return measure(suspect, REFERENCE, inverted(suspect), triggers, OPTIONS, seed=0, progress=silent)


def judged(measurement: Measurement, found: InvertedTrigger, clean: Calibration) -> Verdict:
    return judge(measurement, found, clean, OPTIONS, family="ddpm", shape=SHAPE)


@pytest.mark.parametrize(("suspect", "word"), [(PLANTED, Word.BACKDOORED), (clean_denoiser(LEVELS), Word.CLEAN)])
def test_a_planted_model_is_told_from_a_clean_one(suspect: Denoiser, word: Word) -> None:
    verdict = judged(measured(suspect), inverted(suspect), calibration())
    assert verdict.word is word, verdict.statistics
    assert (verdict.probability > 0.5) is (word is Word.BACKDOORED)


def test_a_measurement_shows_what_the_shift_does() -> None:
    measurement = measured(PLANTED)
    assert measurement.sampler == "DDPM-SCHED"
    assert measurement.triggered.shape == measurement.plain.shape == (8, *SHAPE)
    assert (
        (measurement.triggered * 2 - 1 - TARGET).abs().mean() < 0.1 < (measurement.plain * 2 - 1 - TARGET).abs().mean()
    )
    assert measurement.forward_equivalents == 8 * (2 * (250 + 20) + 20)


def test_a_verdict_says_on_what_it_rests() -> None:
    clean, found = calibration(), inverted(PLANTED, digest=f"{3:064x}")
    verdict = judged(measured(PLANTED), found, clean)
    assert verdict.model_digest == found.model_digest and verdict.seeds == (5,)
    assert verdict.calibration_digest == clean.digest()
    assert "clean-3" not in verdict.calibration_models and len(verdict.calibration_models) == 8
    assert verdict.forward_equivalents == 100 + 8 * (2 * (250 + 20) + 20)


@pytest.mark.parametrize("clean", [calibration(7), calibration(9, family="ncsn")])
def test_too_few_clean_models_of_this_kind_are_no_ground_for_clean(clean: Calibration) -> None:
    suspect = clean_denoiser(LEVELS)
    assert judged(measured(suspect), inverted(suspect), clean).word is Word.INCONCLUSIVE


def test_a_model_is_not_one_of_the_eight_that_cover_it() -> None:
    suspect = clean_denoiser(LEVELS)
    words = [
        judged(measured(suspect), inverted(suspect, digest), calibration(8)).word for digest in (f"{0:064x}", "b" * 64)
    ]
    assert words == [Word.INCONCLUSIVE, Word.CLEAN]


def test_no_clean_model_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no clean model"):
        judged(measured(PLANTED), inverted(PLANTED), calibration(0))


def test_a_measurement_that_is_not_finite_is_inconclusive() -> None:
    measurement = measured(PLANTED)
    broken = dataclasses.replace(measurement, statistics={**measurement.statistics, "uniformity": math.nan})
    verdict = judged(broken, inverted(PLANTED), calibration())
    assert verdict.word is Word.INCONCLUSIVE
    assert "could not be measured" in verdict.reasons[0]
