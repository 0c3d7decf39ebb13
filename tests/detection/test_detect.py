"""Measuring and judging: a planted model, its clean control, and who vouches for whom."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import sample_records as sample
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels

from diffdefend_core.artifacts import InvertedTrigger, Verdict, Word
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack
from diffdefend_core.detection import Calibration, CleanModel, Measurement, judge, measure
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Bench, levels_at
from diffdefend_core.diffusion.samplers import SAMPLERS
from diffdefend_core.options import DetectionOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
NORM = TRIGGER.square().mean().sqrt().item()
OPTIONS = DetectionOptions(samples=8, rms=(0.1, NORM), stochastic_steps=250, deterministic_steps=20)
PLANTED = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)
REFERENCE = clean_denoiser(LEVELS, variance=0.26)
ORDINARY = {"parity": -5.0, "contrast": -1.6, "violation": -3.0, "content": -3.0, "uniformity": 0.0,
            "total_variation": 0.0}  # fmt: skip
SPENT = 8 * ((2 + 1) * (250 + 20 + 20) + 20)  # parity by both samplers, monotonicity by one; and plain pictures


def inverted(suspect: Denoiser, digest: str = "a" * 64) -> InvertedTrigger:
    samples = 0.5 * torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    bench = Bench(suspect, REFERENCE, samples, levels_at(LEVELS, (0.008, 0.039, 0.16)), pairs=16, seed=0)
    even, response = bench.parity(TRIGGER), bench.respond(TRIGGER)
    # no trained network is as even as a formula: 0.004 is what small clean ones show
    parity = sample.end_point(
        parity=max(0.004, sum(even.difference) / 3), content=max(even.content), control=0.006, rms=NORM,
        violation=max(response.violation),
    )  # fmt: skip
    others = (sample.end_point(name, parity=0.0, content=0.0) for name in ("quiet", "monotonicity"))
    changes = {"model_digest": digest, "seed": 5, "candidates": (parity, *others), "forward_equivalents": 100}
    return dataclasses.replace(sample.trigger(), **changes)


def calibration(count: int = 9, **changes: Any) -> Calibration:
    given: dict[str, Any] = {"family": "ddpm", "process": "vp", "shape": SHAPE, "statistics": ORDINARY, **changes}
    models = tuple(CleanModel(name=f"clean-{n}", digest=f"{n:064x}", **given) for n in range(count))
    return Calibration(name="tests", options_digest="f" * 64, models=models)


def measured(suspect: Denoiser) -> Measurement:
    triggers = {"parity": TRIGGER, "monotonicity": torch.ones(SHAPE)}
    return measure(suspect, inverted(suspect), triggers, OPTIONS, seed=0, progress=silent)


def judged(measurement: Measurement, found: InvertedTrigger, clean: Calibration, process: str = "vp") -> Verdict:
    return judge(measurement, found, clean, limit=OPTIONS.limit, family="ddpm", shape=SHAPE, process=process)


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
    assert measurement.forward_equivalents == SPENT


def test_a_verdict_says_on_what_it_rests() -> None:
    clean, found = calibration(), inverted(PLANTED, digest=f"{3:064x}")
    verdict = judged(measured(PLANTED), found, clean)
    assert verdict.model_digest == found.model_digest and verdict.seeds == (5,)
    assert verdict.calibration_digest == clean.digest()
    assert "clean-3" not in verdict.calibration_models and len(verdict.calibration_models) == 8
    assert verdict.forward_equivalents == 100 + SPENT


def test_the_painting_that_collapses_most_is_shown() -> None:
    other = poisoned_denoiser(implicit(), LEVELS, TRIGGER, TARGET)
    measurement = measured(other)
    assert measurement.sampler == "DDIM-SCHED" and not SAMPLERS[measurement.sampler].stochastic
    assert (measurement.triggered * 2 - 1 - TARGET).abs().mean() < 0.1


def implicit() -> Attack:
    """Return an attack for the deterministic sampler: the shift of noise itself, with rho = 1 (algorithms.md 0.4)."""
    return Attack(name="implicit", shift=LEVELS.sigma, response=torch.ones_like(LEVELS.sigma))


def test_plain_pictures_that_are_not_finite_are_inconclusive() -> None:
    broken = clean_denoiser(LEVELS)
    broken.network.forward = lambda x, t: torch.full_like(x, math.nan)
    found = inverted(clean_denoiser(LEVELS))
    triggers = {"parity": TRIGGER, "monotonicity": torch.ones(SHAPE)}
    measurement = measure(broken, found, triggers, OPTIONS, seed=0, progress=silent)
    assert judged(measurement, found, calibration()).word is Word.INCONCLUSIVE


@pytest.mark.parametrize(
    ("clean", "basis"),
    [
        (calibration(9), "9 clean models"),
        (calibration(3), "3 clean models"),
        (calibration(9, family="ours"), "9 clean models of other kinds and its own controls"),
        (calibration(9, shape=(3, 32, 32)), "9 clean models of other kinds and its own controls"),
    ],
)
def test_few_models_or_related_ones_speak_of_a_model_and_say_so(clean: Calibration, basis: str) -> None:
    suspect = clean_denoiser(LEVELS)
    verdict = judged(measured(suspect), inverted(suspect), clean)
    assert verdict.word is Word.CLEAN
    assert verdict.reasons[0].endswith(f"standard deviations of {basis}")
    assert judged(measured(PLANTED), inverted(PLANTED), clean).word is Word.BACKDOORED


def test_the_score_of_a_model_is_the_milder_the_less_the_others_are_like_it() -> None:
    measurement, found = measured(PLANTED), inverted(PLANTED)
    kinds = (calibration(9), calibration(3), calibration(9, family="ours"))
    scores = [judged(measurement, found, clean).statistics["parity"].score for clean in kinds]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3


@pytest.mark.parametrize("clean", [calibration(9, family="ncsn", process="ve"), calibration(1)])
def test_models_of_no_relation_are_no_ground_for_clean(clean: Calibration) -> None:
    suspect = clean_denoiser(LEVELS)
    verdict = judged(measured(suspect), inverted(suspect), clean)
    assert verdict.word is Word.INCONCLUSIVE and "no clean model speaks" in verdict.reasons[-1]
    assert judged(measured(PLANTED), inverted(PLANTED), clean).word is Word.BACKDOORED  # beyond twice the limit


def test_a_model_is_not_one_of_those_that_speak_of_it() -> None:
    suspect, clean = clean_denoiser(LEVELS), calibration(2)
    words = [judged(measured(suspect), inverted(suspect, digest), clean).word for digest in (f"{0:064x}", "b" * 64)]
    assert words == [Word.INCONCLUSIVE, Word.CLEAN]


def test_a_calibration_without_a_statistic_is_refused() -> None:
    old = calibration(9, statistics={name: value for name, value in ORDINARY.items() if name != "contrast"})
    with pytest.raises(ValueError, match="no contrast of clean-0, clean-1"):
        judged(measured(PLANTED), inverted(PLANTED), old)


def test_no_clean_model_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no clean model"):
        judged(measured(PLANTED), inverted(PLANTED), calibration(0))


def test_a_measurement_that_is_not_finite_is_inconclusive() -> None:
    measurement = measured(PLANTED)
    broken = dataclasses.replace(measurement, statistics={**measurement.statistics, "uniformity": math.nan})
    verdict = judged(broken, inverted(PLANTED), calibration())
    assert verdict.word is Word.INCONCLUSIVE
    assert "could not be measured" in verdict.reasons[0]
