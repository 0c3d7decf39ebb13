"""Painting under a shift and its opposite: the norm, the samplers, and what counts of pictures and answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import sample_records as sample
import torch
from analytic import SHAPE, clean_denoiser, perfect_of, poisoned_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack
from diffdefend_core.detection.statistics import (
    CONTROL_FLOOR,
    VIOLATION_FLOOR,
    Painting,
    paint,
    painting_cost,
    painting_steps,
    raw_statistics,
    suitable,
)
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.samplers import SAMPLERS
from diffdefend_core.options import DetectionOptions

LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
NORM = TRIGGER.square().mean().sqrt().item()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
OPTIONS = DetectionOptions(samples=8, rms=(0.1, NORM), stochastic_steps=250, deterministic_steps=50)
NAMES = ("parity", "quiet", "monotonicity")
RANDOM = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))


def implicit_attack(levels: Levels) -> Attack:
    """Return an attack for the deterministic sampler: the shift of noise itself, with rho = 1 (algorithms.md 0.4)."""
    return Attack(name="implicit", shift=levels.sigma, response=torch.ones_like(levels.sigma))


def searched(
    monotonicity: dict[str, Any] | None = None, quiet: dict[str, Any] | None = None, **parity: Any
) -> InvertedTrigger:
    """The record of a search, with changes of what was found."""
    changes = {"parity": parity, "quiet": quiet or {}, "monotonicity": monotonicity or {}}
    candidates = tuple(sample.end_point(name, **changes[name]) for name in NAMES)
    return dataclasses.replace(sample.trigger(), candidates=candidates)


def painted(attack: Attack, tau: Tensor, options: DetectionOptions = OPTIONS) -> dict[tuple[str, str], Painting]:
    suspect, triggers = poisoned_denoiser(attack, LEVELS, TRIGGER, TARGET), dict.fromkeys(NAMES, tau)
    paintings = paint(suspect, searched(parity=0.2), triggers, options, seed=0, progress=lambda done, total: None)
    return {(item.candidate, item.sampler): item for item in paintings}


def painting(triggered: Tensor, opposite: Tensor) -> Painting:
    return Painting(candidate="parity", sampler="DDIM-SCHED", rms=0.5, triggered=triggered, opposite=opposite)


def off_target(images: Tensor) -> float:
    return (images * 2 - 1 - TARGET).abs().mean().item()


def test_each_candidate_is_painted_by_the_samplers_that_suit_it() -> None:
    paintings = painted(baddiffusion(LEVELS), TRIGGER)
    assert list(paintings) == [("parity", "DDPM-SCHED"), ("parity", "DDIM-SCHED"), ("monotonicity", "DDIM-SCHED")]
    for item in paintings.values():
        assert item.triggered.shape == item.opposite.shape == (8, *SHAPE)
        assert item.triggered.min() >= 0 and item.triggered.max() <= 1


@pytest.mark.parametrize("process", ["vp", "ve", "flow", "consistency"])
def test_what_breaks_monotonicity_needs_a_deterministic_sampler_where_there_is_one(process: str) -> None:
    parity, monotonicity = (
        suitable(perfect_of(process), sample.end_point(name)) for name in ("parity", "monotonicity")
    )
    deterministic = [entry for entry in parity if not entry.stochastic]
    assert monotonicity == (deterministic or parity) and 1 <= len(monotonicity) <= len(parity) <= 2
    assert all(process in entry.processes for entry in parity)
    assert len({entry.stochastic for entry in parity}) == len(parity)


@pytest.mark.parametrize(
    ("attack", "sampler"),
    [(baddiffusion(LEVELS), "DDPM-SCHED"), (implicit_attack(LEVELS), "DDIM-SCHED")],
    ids=["sde", "ode"],
)
def test_the_trigger_fires_under_the_sampler_of_its_attack(attack: Attack, sampler: str) -> None:
    paintings = painted(attack, TRIGGER)
    fired = paintings["parity", sampler]
    assert off_target(fired.triggered) < 0.1 < off_target(fired.opposite)
    assert fired.collapse > 1
    assert max(paintings.values(), key=lambda item: item.collapse).sampler == sampler


def test_the_rms_at_which_the_pictures_are_most_alike_is_kept() -> None:
    fired = painted(baddiffusion(LEVELS), 5 * TRIGGER)["parity", "DDPM-SCHED"]  # the norm of the shift is no matter
    assert fired.rms == NORM and off_target(fired.triggered) < 0.1
    weak = painted(baddiffusion(LEVELS), TRIGGER, dataclasses.replace(OPTIONS, rms=(0.1,)))["parity", "DDPM-SCHED"]
    assert weak.rms == 0.1 and off_target(weak.triggered) > 0.1


def test_the_opposite_has_the_same_noise_and_the_same_norm() -> None:
    suspect = clean_denoiser(LEVELS)
    paintings = paint(
        suspect, searched(), dict.fromkeys(NAMES, TRIGGER), dataclasses.replace(OPTIONS, rms=(0.5,)), seed=3,
        progress=lambda done, total: None,
    )  # fmt: skip
    shift = -0.5 * TRIGGER / NORM
    expected = generate(suspect, 8, sampler="DDIM-SCHED", steps=50, seed=3, shift=shift)
    torch.testing.assert_close(paintings[1].opposite, suspect.pictures(expected))


def test_under_the_opposite_of_a_trigger_nothing_collapses() -> None:
    for item in painted(baddiffusion(LEVELS), -TRIGGER, dataclasses.replace(OPTIONS, rms=(0.5,))).values():
        assert item.collapse < 0.1


def test_pictures_that_are_not_finite_are_kept_not_hidden_by_a_norm_that_works() -> None:
    suspect = clean_denoiser(LEVELS)
    answer = suspect.network.forward

    def overflowing(x: Tensor, t: Tensor) -> Tensor:
        along = (x * TRIGGER).mean(dim=(1, 2, 3), keepdim=True).amax()
        return torch.where((t > 240).all() & (along > 0.9 * NORM**2), math.nan, answer(x, t))

    suspect.network.forward = overflowing
    options = dataclasses.replace(OPTIONS, rms=(0.1, 2 * NORM, 0.2))
    triggers = dict.fromkeys(NAMES, TRIGGER)
    for item in paint(suspect, searched(), triggers, options, seed=0, progress=lambda done, total: None):
        assert item.rms == 2 * NORM and math.isnan(item.collapse)


def test_progress_and_cost_count_every_painting() -> None:
    suspect, seen = Counting(perfect_of("ve")), []
    triggers = dict.fromkeys(NAMES, TRIGGER)
    paint(suspect.denoiser, searched(), triggers, OPTIONS, seed=0, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    claimed = painting_cost(suspect.denoiser, searched(), OPTIONS)
    assert 0.95 * claimed < suspect.rows <= claimed


class Counting:
    """A denoiser that counts the rows that go through its network."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.rows, self.answer = denoiser, 0, denoiser.network.forward
        denoiser.network.forward = self.forward

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows += len(x)
        return self.answer(x, t)


@pytest.mark.parametrize("name", ["parity", "quiet"])
def test_of_both_candidates_for_parity_the_one_that_stands_out_is_painted(name: str) -> None:
    loud: dict[str, Any] = {"parity": 0.3, "control": 0.01}
    found = searched(**loud) if name == "parity" else searched(quiet=loud, parity=0.3, control=0.2)
    paintings = paint(
        clean_denoiser(LEVELS), found, dict.fromkeys(NAMES, TRIGGER), OPTIONS, seed=0, progress=lambda *_: None
    )
    assert {item.candidate for item in paintings} == {name, "monotonicity"}


def test_steps_are_bounded_by_the_options_and_the_model() -> None:
    suspect = clean_denoiser(LEVELS)
    assert painting_steps(suspect, SAMPLERS["DDPM-SCHED"], OPTIONS) == 250
    assert painting_steps(suspect, SAMPLERS["DDPM-SCHED"], DetectionOptions(stochastic_steps=1000)) == 250
    assert painting_steps(suspect, SAMPLERS["DDIM-SCHED"], OPTIONS) == 50


def test_the_statistics_by_hand() -> None:
    wide = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) * torch.linspace(0, 1, 8).expand(2, 1, 8, 8)
    narrow = 0.5 * wide
    found = searched({"parity": 0.9, "content": 3.0, "control": 0.9, "violation": 0.7},
                     parity=0.4, content=0.04, control=0.1, violation=0.9)  # fmt: skip
    expected = {
        "parity": math.log(0.4),  # of the search for it
        "contrast": math.log(4),
        "violation": math.log(0.7),
        "content": math.log(3),  # of either
        "uniformity": math.log(2),
        "total_variation": math.log(2),
    }
    assert raw_statistics(found, painting(narrow, wide), wide) == pytest.approx(expected)
    swapped = raw_statistics(found, painting(wide, narrow), wide)
    assert swapped["uniformity"] == pytest.approx(-math.log(2))
    assert swapped["total_variation"] == pytest.approx(math.log(2))


def test_parity_and_contrast_are_those_of_the_candidate_that_shows_more() -> None:
    found = searched(quiet={"parity": 0.3, "control": 0.05, "content": 2.0}, parity=0.1, control=0.2, content=0.1)
    statistics = raw_statistics(found, painting(RANDOM, RANDOM), RANDOM)
    assert statistics["parity"] == pytest.approx(math.log(0.3))
    assert statistics["contrast"] == pytest.approx(math.log(6))
    assert statistics["content"] == pytest.approx(math.log(2))


def test_a_law_that_is_kept_stays_at_its_floor() -> None:
    kept = raw_statistics(searched({"violation": -3.0}), painting(RANDOM, RANDOM), RANDOM)
    assert kept["violation"] == pytest.approx(math.log(VIOLATION_FLOOR))


def test_controls_that_show_next_to_nothing_count_as_their_floor() -> None:
    silent = {"parity": 1e-5, "control": 0.0}
    low, lower = (
        raw_statistics(searched(quiet=silent, control=value), painting(RANDOM, RANDOM), RANDOM) for value in (1e-4, 0.0)
    )
    assert low == lower
    assert low["contrast"] == pytest.approx(math.log(sample.end_point().parity / CONTROL_FLOOR))


def test_what_collapses_on_both_sides_does_not_count() -> None:
    grey = torch.full((8, *SHAPE), 0.5)
    statistics = raw_statistics(searched(), painting(grey, grey), RANDOM)
    assert statistics["uniformity"] == statistics["total_variation"] == 0


def test_a_model_whose_plain_pictures_are_alike_does_not_collapse() -> None:
    """The weaker of both comparisons counts: with the opposite shift, and with no shift."""
    grey = torch.full((8, *SHAPE), 0.5)
    assert raw_statistics(searched(), painting(grey, RANDOM), grey)["uniformity"] == 0
    assert raw_statistics(searched(), painting(grey, RANDOM), RANDOM)["uniformity"] > 2


def test_identical_pictures_give_a_large_but_finite_statistic() -> None:
    black = torch.zeros(8, *SHAPE)
    statistics = raw_statistics(searched(), painting(black, RANDOM), RANDOM)
    assert all(math.isfinite(value) for value in statistics.values())
    assert statistics["uniformity"] > 2 and statistics["total_variation"] > 2


@pytest.mark.parametrize(("parity", "measured"), [(0.0, False), (1e-7, False), (1e-3, True)])
def test_a_twin_that_forgot_nothing_measures_nothing(parity: float, measured: bool) -> None:
    found = raw_statistics(searched(quiet={"parity": 0.0}, parity=parity), painting(RANDOM, RANDOM), RANDOM)["parity"]
    assert math.isfinite(found) is measured


def test_pictures_that_are_not_finite_stay_visible() -> None:
    broken = torch.full((8, *SHAPE), math.nan)
    for item in (painting(broken, RANDOM), painting(RANDOM, broken)):
        statistics = raw_statistics(searched(), item, RANDOM)
        assert math.isnan(statistics["uniformity"]) and math.isnan(statistics["total_variation"])
    assert math.isnan(raw_statistics(searched(), painting(RANDOM, RANDOM), broken)["uniformity"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["parity", "content", "control", "violation"])
def test_numbers_that_are_not_finite_stay_visible(name: str, field: str) -> None:
    broken = {field: math.nan}
    found = searched(**broken) if name == "parity" else searched(**{name: broken})
    statistics = raw_statistics(found, painting(RANDOM, RANDOM), RANDOM)
    hidden = {("monotonicity", "parity"), ("monotonicity", "control"), ("parity", "violation"), ("quiet", "violation")}
    assert any(math.isnan(value) for value in statistics.values()) is ((name, field) not in hidden)
