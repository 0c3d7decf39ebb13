"""What the peers measure, on golden triggers and on a planted model, and how they score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import sample_records as sample
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, Statistic
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.detection import Measurement
from diffdefend_core.detection.images import total_variation, uniformity
from diffdefend_core.detection.peers import (
    divergence,
    measure_elijah,
    measure_purediffusion,
    measure_terd,
    score_elijah,
    score_purediffusion,
    score_terd,
    similarity,
)
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.options import ElijahOptions, PureDiffusionOptions, TerdOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
BOX = trigger("box", 8)
PLANTED = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, BOX, TARGET)
TRIGGERS = {"sde": BOX, "ode": 0.1 * BOX}


def record(method: str = "elijah", responses: Mapping[str, float] | None = None) -> InvertedTrigger:
    candidates = tuple(
        sample.end_point(name, response=(response,), x0_response=())
        for name, response in (responses or {"sde": 0.5, "ode": 1.0}).items()
    )
    return InvertedTrigger(
        model_digest="a" * 64,
        method=method,
        seed=5,
        timesteps=(249,),
        candidates=candidates,
        best=candidates[-1].name,
        forward_equivalents=100,
    )


def elijah(suspect: Denoiser, found: InvertedTrigger | None = None, samples: int = 8) -> Measurement:
    options = ElijahOptions(samples=samples)
    return measure_elijah(suspect, found or record(), TRIGGERS, options, seed=0, progress=silent)


def purediffusion(suspect: Denoiser) -> Measurement:
    options = PureDiffusionOptions(samples=8)
    return measure_purediffusion(suspect, record(), TRIGGERS, options, seed=0, progress=silent)


def terd(triggers: Mapping[str, Tensor]) -> Measurement:
    return measure_terd(small_denoiser(LEVELS), record("terd"), triggers, TerdOptions(), seed=0, progress=silent)


def test_elijah_keeps_the_candidate_whose_images_are_most_alike() -> None:
    measurement, clean = elijah(PLANTED), elijah(clean_denoiser(LEVELS))
    assert measurement.sampler == "DDPM-SCHED"
    assert (measurement.triggered * 2 - 1 - TARGET).abs().mean() < 0.1
    assert measurement.statistics["uniformity"] > clean.statistics["uniformity"] + 1
    assert len(measurement.plain) == 0


def test_the_statistics_of_elijah_are_those_of_the_images_it_keeps() -> None:
    measurement = elijah(small_denoiser(LEVELS))
    assert measurement.statistics == {
        "uniformity": pytest.approx(-math.log(uniformity(measurement.triggered))),
        "total_variation": pytest.approx(math.log(total_variation(measurement.triggered))),
    }


def test_each_lambda_is_painted_by_its_kind_of_sampler_with_the_published_steps() -> None:
    assert elijah(PLANTED, record(responses={"sde": 0.5})).forward_equivalents == 8 * 250  # at most 1000: all levels
    assert elijah(PLANTED, record(responses={"ode": 1.0})).forward_equivalents == 8 * 50
    assert elijah(PLANTED).forward_equivalents == 8 * (250 + 50)


@pytest.mark.parametrize(
    ("process", "samplers", "calls"),
    [
        ("ve", {"SCORE-SDE-VE", "EDM-VE-ODE"}, 2 * (100 + 50)),
        ("flow", {"EULER"}, 50 + 50),
        ("consistency", {"CONSISTENCY"}, 2 + 2),
    ],
)
def test_every_family_is_painted_by_what_fits_it(process: str, samplers: set[str], calls: int) -> None:
    measurement = elijah(small_of(process), samples=2)
    assert measurement.sampler in samplers
    assert measurement.forward_equivalents == 2 * calls
    assert measurement.triggered.min() >= 0 and measurement.triggered.max() <= 1


def test_purediffusion_sees_similar_images_and_a_large_shift() -> None:
    planted, clean = purediffusion(PLANTED), purediffusion(clean_denoiser(LEVELS))
    assert planted.sampler == "DDPM-SCHED" and planted.forward_equivalents == 8 * (250 + 50)
    assert planted.statistics["similarity"] > clean.statistics["similarity"] + 1
    assert planted.statistics["divergence"] == pytest.approx(math.log(BOX.square().mean().item() / 2))


def test_the_same_seed_measures_the_same() -> None:
    assert elijah(PLANTED).statistics == elijah(PLANTED).statistics
    assert purediffusion(PLANTED).statistics == purediffusion(PLANTED).statistics


@pytest.mark.parametrize(("side", "mean"), [(4, 0.4922), (8, 0.4688), (11, 0.4409), (14, 0.4043), (18, 0.3418)])
def test_golden_divergence_of_the_box_triggers(side: int, mean: float) -> None:
    box = torch.full((3, 32, 32), -1.0)
    box[:, -side:, -side:] = 0
    assert divergence(box).mean().item() == pytest.approx(mean, abs=5e-5)
    share = 1 - side**2 / 32**2
    assert terd({"mu": box}).statistics == {
        "divergence_mean": pytest.approx(math.log(share / 2)),
        "divergence_variance": pytest.approx(math.log(share * (1 - share) / 4)),
    }


def test_golden_divergence_of_the_invisible_trigger() -> None:
    assert divergence(torch.full((3, 32, 32), 0.2)).mean().item() == pytest.approx(0.02)


def test_the_divergence_is_that_of_torch() -> None:
    mu, gamma = torch.randn(SHAPE), 0.1 + torch.rand(SHAPE)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu.double(), gamma.double()), normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mu, gamma), expected)


def test_terd_counts_gamma_where_it_was_fitted_and_paints_nothing() -> None:
    mu = 0.3 * torch.ones(SHAPE)
    without, fitted = terd({"mu": mu}), terd({"mu": mu, "gamma": torch.full(SHAPE, 0.5)})
    assert fitted.statistics["divergence_mean"] > without.statistics["divergence_mean"]
    assert without.forward_equivalents == 0
    assert without.triggered.shape == without.plain.shape == (0, *SHAPE)


def test_a_shift_of_zero_has_finite_statistics() -> None:
    assert all(math.isfinite(value) for value in terd({"mu": torch.zeros(SHAPE)}).statistics.values())


def test_similarity_by_hand() -> None:
    first, second = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    first[0, 0, 0], second[0, 1, 1] = 1, 0.5
    assert similarity(torch.stack([first, second])) == pytest.approx(0, abs=1e-5)
    assert similarity(torch.stack([first, 0.5 * first])) == pytest.approx(1)
    assert similarity(torch.stack([first, first, second])) == pytest.approx(1 / 3, abs=1e-5)
    assert similarity(torch.zeros(4, 1, 2, 2)) == pytest.approx(1)


def test_images_that_are_no_numbers_make_the_score_unknown() -> None:
    broken = small_denoiser(LEVELS)
    broken.network.outer.bias[0] = math.nan
    for measurement in (elijah(broken), purediffusion(broken)):
        assert any(math.isnan(value) for value in measurement.statistics.values())


@dataclass(frozen=True)
class Scoring:
    score: Callable[[Mapping[str, Statistic]], float]
    names: tuple[str, str]


SCORINGS = [
    Scoring(score_elijah, ("uniformity", "total_variation")),
    Scoring(score_terd, ("divergence_mean", "divergence_variance")),
    Scoring(score_purediffusion, ("similarity", "divergence")),
]


def standing(score: float) -> Statistic:
    return Statistic(value=0.0, center=0.0, spread=1.0, score=score, anomalous=False)


@pytest.mark.parametrize("scoring", SCORINGS, ids=["elijah", "terd", "purediffusion"])
def test_the_score_is_the_larger_of_two_and_unknown_without_either(scoring: Scoring) -> None:
    first, second = scoring.names
    assert scoring.score({first: standing(3.0), second: standing(1.0)}) == 3
    assert scoring.score({first: standing(1.0), second: standing(3.0)}) == 3
    assert math.isnan(scoring.score({first: standing(3.0)}))
    assert math.isnan(scoring.score({second: standing(3.0)}))
    assert math.isnan(scoring.score({first: standing(math.nan), second: standing(3.0)}))
    assert math.isnan(scoring.score({first: standing(3.0), second: standing(math.nan)}))


def test_elijah_counts_a_total_variation_on_either_side_the_others_count_one_side() -> None:
    assert score_elijah({"uniformity": standing(1.0), "total_variation": standing(-4.0)}) == 4
    assert score_elijah({"uniformity": standing(-4.0), "total_variation": standing(1.0)}) == 1
    assert score_terd({"divergence_mean": standing(-4.0), "divergence_variance": standing(1.0)}) == 1
    assert score_purediffusion({"similarity": standing(-4.0), "divergence": standing(1.0)}) == 1
