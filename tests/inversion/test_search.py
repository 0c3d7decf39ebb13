"""The search on networks in closed form: the planted direction is found, and nothing is found where nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.attacks.trojdiff import trojdiff
from diffdefend_core.attacks.villan import villan_ode
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Answers, Bench, levels_at, probes_at, rms
from diffdefend_core.inversion.objectives import (
    Objective,
    alikeness_loss,
    monotonicity_loss,
    painting_loss,
    parity_loss,
    picture_loss,
)
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.inversion.search import Track, normal_starts, race, race_length, starts
from diffdefend_core.options import InversionOptions

LEVELS = vp_levels()
OPTIONS = InversionOptions(starts=3, race_iterations=8, iterations=40, pairs=4)
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
REFERENCE = clean_denoiser(LEVELS)
ATTACKS = {"sde": baddiffusion(LEVELS), "ode": villan_ode(LEVELS), "troj": trojdiff(LEVELS, 1.0)}
# prior log-odds of a poisoned row: the network switches before half of the trigger, as trained ones do
EAGER = 8.0
BEGUN = normal_starts(SHAPE, 3, seed=0)
SHAPES = [("box", 1), ("box", -1), ("stripes", 1), ("stripes", -1), ("checker", 1), ("checker", -1)]


def planted(shift: Tensor, attack: str = "sde", prior: float = 0.0) -> Denoiser:
    suspect = poisoned_denoiser(ATTACKS[attack], LEVELS, shift, TARGET)
    suspect.network.prior.fill_(prior)
    return suspect


def bench(suspect: Denoiser) -> Bench:
    return Bench(suspect, REFERENCE, SAMPLES, levels_at(LEVELS, OPTIONS.signals), pairs=4, seed=0, each=3)


def raced(
    objective: Objective,
    probes: int,
    begun: Sequence[Tensor] = BEGUN,
    *,
    norm: float = OPTIONS.rms,
    rate: float = OPTIONS.learning_rate,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Track:
    return race(objective, probes, begun, OPTIONS, norm=norm, learning_rate=rate, seed=seed, progress=progress)


def by_parity(suspect: Denoiser, seed: int = 0) -> Track:
    return raced(parity_loss(bench(suspect)), 9, seed=seed)


def by_monotonicity(suspect: Denoiser) -> Track:
    probes = probes_at(SAMPLES, levels_at(LEVELS, OPTIONS.moderate_signals), pairs=4, seed=1, each=3)
    objective = monotonicity_loss(Answers(suspect, probes))
    return raced(objective, len(probes), norm=OPTIONS.moderate_rms, rate=OPTIONS.moderate_learning_rate)


@pytest.mark.parametrize("attack", ["sde", "troj"])
@pytest.mark.parametrize(("name", "sign"), SHAPES)
def test_parity_finds_the_planted_direction_up_to_its_sign(name: str, sign: int, attack: str) -> None:
    shift = sign * trigger(name, 8)
    best = by_parity(planted(shift, attack))
    assert abs(cosine(best.direction.detach(), shift)) > 0.9
    assert rms(best.direction).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("name", "sign"), SHAPES)
def test_monotonicity_finds_the_planted_direction_with_its_sign(name: str, sign: int) -> None:
    shift = sign * trigger(name, 8)
    best = by_monotonicity(planted(shift, "ode", EAGER))
    assert cosine(best.direction.detach(), shift) > 0.9
    assert best.loss[-1].item() < -0.1  # x0 moves against the shift


def test_nothing_is_found_in_a_clean_model() -> None:
    shift, clean = trigger("stripes", 8), clean_denoiser(LEVELS, 0.26)
    found, nothing = by_parity(planted(shift)), by_parity(clean)
    assert min(nothing.loss) > found.loss[-1] + 4
    assert abs(cosine(nothing.direction.detach(), shift)) < 0.5
    assert min(by_monotonicity(clean).loss) > 0


def test_no_difference_at_all_moves_nothing() -> None:
    best = by_parity(REFERENCE)
    assert all(math.isfinite(value) for value in best.loss)
    assert max(cosine(best.direction.detach(), start) for start in BEGUN) > 0.999


def test_parity_is_even_and_monotonicity_is_not() -> None:
    shift = 0.6 * trigger("box", 8)
    parity = parity_loss(bench(planted(shift)))
    assert parity(shift, 0).item() == pytest.approx(parity(-shift, 0).item(), rel=1e-4)
    probes = probes_at(SAMPLES, levels_at(LEVELS, OPTIONS.moderate_signals), pairs=4, seed=1)
    monotonicity = monotonicity_loss(Answers(planted(shift, "ode"), probes))
    assert monotonicity(shift, 2) < 0 < monotonicity(-shift, 2)


def test_parity_does_not_count_what_the_reference_does_too() -> None:
    suspect, shift = planted(trigger("box", 8)), trigger("box", 8)
    alike = Bench(suspect, suspect, SAMPLES, levels_at(LEVELS, OPTIONS.signals), pairs=4, seed=0)
    assert parity_loss(alike)(shift, 0) > parity_loss(bench(suspect))(shift, 0) + 10


def test_a_picture_has_a_sign_and_does_not_count_if_the_reference_paints_it_too() -> None:
    shift = trigger("box", 8)
    suspect = planted(shift)
    alike = Bench(suspect, suspect, SAMPLES, levels_at(LEVELS, OPTIONS.signals), pairs=4, seed=0)
    picture = picture_loss(bench(suspect))
    assert picture(shift, 0) < picture(-shift, 0) - 1
    assert picture_loss(alike)(shift, 0) > picture(shift, 0) + 10


def test_a_picture_counts_the_less_the_more_it_varies() -> None:
    """Louder noise is what makes the images under one shift vary."""
    shift, clean = trigger("box", 8), clean_denoiser(LEVELS)
    at = levels_at(LEVELS, OPTIONS.signals)
    loss = picture_loss(Bench(planted(shift), clean, SAMPLES, at, pairs=4, seed=0))
    louder = picture_loss(Bench(planted(shift), clean, SAMPLES, at, pairs=4, seed=0, noise=3.0))
    assert loss(shift, 0) < louder(shift, 0)


def test_a_shift_leads_to_a_picture_and_makes_the_images_alike() -> None:
    """On the clean side of the trigger images are those of the data: far from the picture, and from each other."""
    shift = trigger("box", 8)
    asked = Answers(planted(shift), probes_at(SAMPLES, levels_at(LEVELS, OPTIONS.signals), pairs=4, seed=0))
    picture = asked.images(shift, 0).mean(0)
    painting, alike = painting_loss(asked, picture), alikeness_loss(asked)
    assert painting(shift, 0) < painting(-shift, 0) - 1
    apart = asked.images(shift, 0).var(0).mean().sqrt().log().item()
    assert alike(shift, 0).item() == pytest.approx(apart)
    assert alike(0 * shift, 0).isfinite()


def towards(goal: Tensor, seen: list[tuple[Tensor, int]]) -> Objective:
    """Return an objective that is smallest along `goal`, and keeps what it was asked."""

    def objective(tau: Tensor, number: int) -> Tensor:
        seen.append((tau.detach().clone(), number))
        return -(tau * goal).sum() / tau.square().sum().sqrt()

    return objective


def test_every_start_gets_its_share_and_the_best_one_goes_on() -> None:
    goal, seen = trigger("stripes", 8), []
    begun = [-goal, BEGUN[0], goal + 0.5 * BEGUN[1]]
    best = raced(towards(goal, seen), 5, begun, norm=0.3)
    assert len(seen) == race_length(OPTIONS) == 2 * 8 + 40
    assert len(best.loss) == 40 and cosine(best.direction.detach(), goal) > 0.999
    first = [seen[8 * number][0] for number in range(3)]
    assert all(cosine(tau, start) > 0.999 for tau, start in zip(first, begun, strict=True))
    assert cosine(seen[24][0], seen[23][0]) > 0.9  # the third goes on where it was
    assert {number for _, number in seen} == set(range(5))
    assert all(rms(tau).item() == pytest.approx(0.3, rel=1e-4) for tau, _ in seen)
    assert rms(best.shift).item() == pytest.approx(0.3, rel=1e-4)
    assert cosine(best.shift.detach(), best.direction.detach()) == pytest.approx(1, abs=1e-5)


def test_a_start_at_which_the_model_answers_no_numbers_does_not_win() -> None:
    suspect = planted(trigger("box", 8))
    answer = suspect.network.forward

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) * torch.where(x.mean() > 0.1, math.nan, 1.0)

    suspect.network.forward = broken
    named = dict(starts(SHAPE, 2, seed=0))
    asked = Answers(suspect, probes_at(SAMPLES, (240,), pairs=4, seed=0))
    for begun in (list(named.values()), list(named.values())[::-1]):
        best = raced(monotonicity_loss(asked), 1, begun)
        assert all(math.isfinite(value) for value in best.loss) and best.direction.mean() < 0


def test_progress_counts_every_iteration() -> None:
    seen: list[tuple[int, int]] = []
    objective = towards(TARGET, [])
    raced(objective, 1, progress=lambda *step: seen.append(step))
    assert seen == [(done, 2 * 8 + 40) for done in range(1, 57)]


def test_a_search_is_reproducible_by_its_seed() -> None:
    suspect = planted(trigger("stripes", 8))
    first, again, other = (by_parity(suspect, seed) for seed in (1, 1, 2))
    assert torch.equal(first.direction, again.direction) and first.loss == again.loss
    assert first.loss != other.loss


def test_the_starts_of_the_peers_have_both_signs_and_then_none() -> None:
    named = dict(starts(SHAPE, 4, seed=0))
    assert list(named) == ["negative", "positive", "normal-1", "normal-2"]
    assert named["negative"].max() <= 0 <= named["positive"].min()
    assert abs(named["normal-1"].mean()) < 0.4 and not torch.equal(named["normal-1"], named["normal-2"])
    assert all(tensor.shape == SHAPE for tensor in named.values())


def test_normal_starts_have_no_sign_and_differ() -> None:
    first, second, third = normal_starts(SHAPE, 3, seed=4)
    assert all(abs(start.mean()) < 0.4 and start.shape == SHAPE for start in (first, second, third))
    assert max(abs(cosine(first, second)), abs(cosine(first, third)), abs(cosine(second, third))) < 0.5
    assert torch.equal(first, normal_starts(SHAPE, 1, seed=4)[0])
