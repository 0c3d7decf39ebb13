"""Painting under a shift: the right sampler is chosen, and what suspect and twin share does not count."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.artifacts import TriggerCandidate
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack
from diffdefend_core.detection.statistics import Painting, paint, raw_statistics
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.options import DetectionOptions

LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
OPTIONS = DetectionOptions(samples=8, stochastic_steps=250, deterministic_steps=50)


def implicit_attack(levels: Levels) -> Attack:
    """Return an attack for the deterministic sampler: the shift of noise itself, with rho = 1 (algorithms.md 0.4)."""
    return Attack(name="implicit", shift=levels.sigma, response=torch.ones_like(levels.sigma))


def painted(attack: Attack, tau: Tensor) -> Painting:
    suspect = poisoned_denoiser(attack, LEVELS, TRIGGER, TARGET)
    return paint(suspect, clean_denoiser(LEVELS), tau, OPTIONS, seed=0, progress=lambda done, total: None)


def candidate(**changes: object) -> TriggerCandidate:
    given: dict[str, object] = {"name": "a", "rms": 0.5, "difference": 0.4, "gain": 0.5, "loss": (1.0,)}
    given |= {"moderate_difference": 0.04, "violation": -0.3}
    given |= {"response": (0.5, 0.5), "x0_response": (-3.0, 2.0)}
    return TriggerCandidate(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "sampler"),
    [(baddiffusion(LEVELS), "DDPM-SCHED"), (implicit_attack(LEVELS), "DDIM-SCHED")],
    ids=["sde", "ode"],
)
def test_the_sampler_under_which_the_trigger_fires_is_chosen(attack: Attack, sampler: str) -> None:
    painting = painted(attack, TRIGGER)
    assert painting.sampler == sampler
    assert painting.suspect.shape == painting.reference.shape == (8, *SHAPE)
    assert (painting.suspect * 2 - 1 - TARGET).abs().mean() < 0.1
    statistics = raw_statistics(candidate(), painting)
    assert statistics["uniformity"] > 1 and statistics["total_variation"] > 0.25


def test_the_opposite_shift_fires_nothing() -> None:
    statistics = raw_statistics(candidate(), painted(baddiffusion(LEVELS), -TRIGGER))
    assert abs(statistics["uniformity"]) < 0.1 and statistics["total_variation"] < 0.1


def test_what_twin_and_suspect_paint_alike_does_not_count() -> None:
    same = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    statistics = raw_statistics(candidate(), Painting(sampler="DDIM-SCHED", suspect=same, reference=same))
    assert statistics["uniformity"] == statistics["total_variation"] == 0


def test_the_statistics_by_hand() -> None:
    wide = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) * torch.linspace(0, 1, 8).expand(2, 1, 8, 8)
    narrow = 0.5 * wide
    statistics = raw_statistics(candidate(), Painting(sampler="DDIM-SCHED", suspect=narrow, reference=wide))
    expected = {
        "twin_response": math.log(0.4),
        "moderate_response": math.log(0.04),
        "violation": math.log(0.1),
        "x0_response": math.log(3),
        "uniformity": math.log(2),
        "total_variation": math.log(2),
    }
    assert statistics == pytest.approx(expected)
    swapped = raw_statistics(candidate(), Painting(sampler="DDIM-SCHED", suspect=wide, reference=narrow))
    assert swapped["uniformity"] == pytest.approx(-math.log(2))
    assert swapped["total_variation"] == pytest.approx(math.log(2))


def test_identical_pictures_give_a_large_but_finite_statistic() -> None:
    black = torch.zeros(4, *SHAPE)
    noisy = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    statistics = raw_statistics(candidate(), Painting(sampler="DDIM-SCHED", suspect=black, reference=noisy))
    assert all(math.isfinite(value) for value in statistics.values())
    assert statistics["uniformity"] > 10


@pytest.mark.parametrize(("difference", "measured"), [(0.0, False), (1e-7, False), (1e-3, True)])
def test_a_twin_that_forgot_nothing_measures_nothing(difference: float, measured: bool) -> None:
    same = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    painting = Painting(sampler="DDIM-SCHED", suspect=same, reference=same)
    found = raw_statistics(candidate(difference=difference), painting)["twin_response"]
    assert math.isfinite(found) is measured


def test_pictures_that_are_not_finite_stay_visible() -> None:
    broken = torch.full((4, *SHAPE), math.nan)
    statistics = raw_statistics(
        candidate(), Painting(sampler="DDIM-SCHED", suspect=broken, reference=torch.rand(4, *SHAPE))
    )
    assert math.isnan(statistics["uniformity"]) and math.isnan(statistics["total_variation"])
