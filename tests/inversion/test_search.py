"""The search on networks in closed form: the planted direction is found, and nothing is found where nothing is."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Bench, levels_at, rms
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.inversion.search import Track, race, starts
from diffdefend_core.options import InversionOptions

LEVELS = vp_levels()
OPTIONS = InversionOptions(starts=4, finalists=2, race_iterations=10, iterations=50, pairs=4)
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
REFERENCE = clean_denoiser(LEVELS)


def planted(shift: Tensor) -> Denoiser:
    return poisoned_denoiser(baddiffusion(LEVELS), LEVELS, shift, TARGET)


def bench(suspect: Denoiser) -> Bench:
    return Bench(suspect, REFERENCE, SAMPLES, levels_at(LEVELS, OPTIONS.signals), pairs=4, seed=0, each=3)


def raced(suspect: Denoiser, seed: int = 0) -> list[Track]:
    return race(bench(suspect), SHAPE, OPTIONS, seed=seed, progress=lambda done, total: None)


@pytest.mark.parametrize(("name", "sign"), [("box", 1), ("box", -1), ("stripes", 1), ("checker", 1)])
def test_the_planted_direction_is_found_whatever_its_sign(name: str, sign: int) -> None:
    shift = sign * trigger(name, 8)
    best = raced(planted(shift))[0]
    assert cosine(best.direction.detach(), shift) > 0.8
    assert rms(best.direction).item() == pytest.approx(1, abs=1e-5)


def test_nothing_is_found_in_a_clean_model() -> None:
    shift = trigger("stripes", 8)
    found, clean = raced(planted(shift))[0], raced(clean_denoiser(LEVELS, 0.26))[0]
    assert min(clean.loss) > found.loss[-1] + 4
    assert abs(cosine(clean.direction.detach(), shift)) < 0.5


def test_no_difference_at_all_moves_nothing() -> None:
    tracks = raced(REFERENCE)
    assert all(math.isfinite(value) for track in tracks for value in track.loss)
    begun = {name: start / rms(start) for name, start in starts(SHAPE, 4, seed=0)}
    assert all(cosine(track.direction.detach(), begun[track.name]) > 0.999 for track in tracks)


def test_a_start_at_which_the_model_answers_no_numbers_does_not_win() -> None:
    suspect = planted(trigger("box", 8))
    answer = suspect.network.forward

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) * torch.where(x.mean() > 0.1, math.nan, 1.0)

    suspect.network.forward = broken
    assert raced(suspect)[0].name == "negative"


def test_the_best_starts_go_on_and_come_first() -> None:
    tracks = raced(planted(trigger("box", 8)))
    assert [len(track.loss) for track in tracks] == [50, 50]
    assert tracks[0].name == "negative"  # the sign of a trigger on a background of -1
    recent = [sum(track.loss[-10:]) / 10 for track in tracks]
    assert recent == sorted(recent)


def test_progress_counts_every_iteration() -> None:
    seen: list[tuple[int, int]] = []
    race(bench(clean_denoiser(LEVELS, 0.3)), SHAPE, OPTIONS, seed=0, progress=lambda *step: seen.append(step))
    assert seen == [(done, 4 * 10 + 2 * 40) for done in range(1, 121)]


def test_a_search_is_reproducible_by_its_seed() -> None:
    suspect = planted(trigger("stripes", 8))
    first, again, other = (raced(suspect, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.direction, again.direction) and first.loss == again.loss
    assert first.loss != other.loss


def test_the_starts_have_both_signs_and_then_none() -> None:
    named = dict(starts(SHAPE, 4, seed=0))
    assert list(named) == ["negative", "positive", "normal-1", "normal-2"]
    assert named["negative"].max() <= 0 <= named["positive"].min()
    assert abs(named["normal-1"].mean()) < 0.4 and not torch.equal(named["normal-1"], named["normal-2"])
    assert all(tensor.shape == SHAPE for tensor in named.values())


def test_what_both_models_answer_alike_cancels() -> None:
    shift, suspect = trigger("stripes", 8), planted(trigger("stripes", 8))
    same = Bench(suspect, suspect, SAMPLES, (200,), pairs=8, seed=0)
    other = Bench(suspect, REFERENCE, SAMPLES, (200,), pairs=8, seed=0)
    delta, delta_reference = same.shifts(shift, 0)
    assert torch.equal(delta, delta_reference)
    delta, delta_reference = other.shifts(shift, 0)
    assert rms(delta - delta_reference) > 0.2
    assert not any(delta.any() for delta in other.shifts(torch.zeros(SHAPE), 0))
