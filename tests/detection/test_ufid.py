"""UFID on perfect and on trained backdoored models, with clean noise and the clean model as controls."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_of, vp_levels
from safetensors.torch import load_file
from torch import Tensor

from diffdefend_core.attacks.villan import villan_ode
from diffdefend_core.detection.ufid import Query, compare, densities, density, perturbed, references, ufid
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.errors import InputError
from diffdefend_core.loading.build import load_denoiser

ZOO = Path(__file__).parents[2] / "zoo" / "digits"
LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
PLANTED = poisoned_denoiser(villan_ode(LEVELS), LEVELS, TRIGGER, TARGET)
CLEAN = clean_denoiser(LEVELS)
QUERY = Query(sampler="DDIM-SCHED", steps=10, variants=4)


def drawn(count: int, seed: int = 9) -> Tensor:
    return standard_normal(generators(seed, count), SHAPE)


def silent(done: int, total: int) -> None:
    """Report nothing."""


def asked(denoiser: Denoiser, noise: Tensor, query: Query = QUERY, rate: float = 0.01) -> list[bool]:
    found = ufid(denoiser, noise, query, rate, seed=1, progress=silent)
    assert torch.equal(found.flags, found.p_values <= rate)
    return [bool(flag) for flag in found.flags]


def test_triggered_noise_is_flagged_and_clean_noise_is_not() -> None:
    assert asked(PLANTED, drawn(5) + TRIGGER) == [True] * 5
    assert sum(asked(PLANTED, drawn(20))) <= 1


def test_a_clean_model_hardly_paints_the_same_shift_more_alike() -> None:
    planted, clean, plain = (
        densities(model, drawn(10) + shift, QUERY, seed=0, progress=silent)
        for model, shift in ((PLANTED, TRIGGER), (CLEAN, TRIGGER), (CLEAN, torch.zeros(SHAPE)))
    )
    assert planted.min() > 0.99
    torch.testing.assert_close(clean, plain, rtol=0, atol=0.02)


def test_a_trained_backdoor_is_seen_by_the_sampler_it_was_made_for_and_its_clean_parent_is_not() -> None:
    model, parent = load_denoiser(ZOO / "bad-a-stripes"), load_denoiser(ZOO / "base-a")
    trigger = load_file(ZOO / "backdoors" / "bad-a-stripes.safetensors")["trigger"]
    noise = standard_normal(generators(9, 3), model.shape)
    stochastic = Query(sampler="DDPM-SCHED", steps=30, variants=4)
    found = ufid(model, torch.cat([noise, noise + trigger]), stochastic, 0.1, seed=0, progress=silent)
    assert found.flags[3:].all() and not found.flags[:3].all()
    assert found.densities[3:].min() > 0.97 and found.reference.max() < 0.75
    assert densities(parent, noise + trigger, stochastic, seed=0, progress=silent).max() < 0.75


def test_a_density_depends_on_seed_and_noise_alone() -> None:
    noise = drawn(40)
    together = densities(PLANTED, noise, QUERY, seed=3, progress=silent)
    alone = [densities(PLANTED, row[None], QUERY, seed=3, progress=silent) for row in noise[30:33]]
    torch.testing.assert_close(torch.cat(alone), together[30:33])
    assert not torch.allclose(together, densities(PLANTED, noise, QUERY, seed=4, progress=silent))


def test_noise_is_in_units_of_the_initial_noise() -> None:
    model, seen = small_of("ve"), []
    model.network.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    densities(model, drawn(20), Query(sampler="EDM-VE-ODE", steps=3, variants=2), seed=0, progress=silent)
    assert model.levels.initial_scale == pytest.approx(50)
    assert seen[0].std().item() == pytest.approx(50, rel=0.05)


def test_the_cost_is_what_the_network_was_called_with() -> None:
    model, calls = small_of("vp"), []
    model.network.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    reports: list[tuple[int, int]] = []
    found = ufid(model, drawn(2), QUERY, 0.02, seed=0, progress=lambda done, total: reports.append((done, total)))
    assert found.forward_equivalents == sum(calls) == (49 + 2) * 4 * 10
    assert len(found.reference) == 49 and reports[-1] == (51, 51)


def test_density_is_one_less_the_mean_distance_of_pairs() -> None:
    black, white, grey = (torch.full((1, 1, 2, 2), value) for value in (0.0, 1.0, 0.4))
    assert density(torch.cat([grey] * 3)).item() == pytest.approx(1)
    assert density(torch.cat([black, white])).item() == pytest.approx(0)
    assert density(torch.cat([black, white, grey])).item() == pytest.approx(1 - (1 + 0.4 + 0.6) / 3)
    half = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 2, 2)
    assert density(torch.cat([black, half])).item() == pytest.approx(1 - math.sqrt(0.5))


def test_variants_of_clean_noise_are_clean_noise_that_keeps_its_share() -> None:
    rows = drawn(2)
    variants = perturbed(rows, generators(5, 800), 0.6)
    of_each = variants.view(2, 400, *SHAPE)
    torch.testing.assert_close(of_each.mean(1), 0.8 * rows, rtol=0, atol=0.15)
    assert of_each.std(1).mean().item() == pytest.approx(0.6, abs=0.01)
    fresh = perturbed(drawn(500, seed=4), generators(5, 500), 0.6)
    assert fresh.std().item() == pytest.approx(1, abs=0.02) and fresh.mean().item() == pytest.approx(0, abs=0.02)


def test_a_row_that_was_drawn_with_the_seed_of_the_query_does_not_meet_itself() -> None:
    model, seen = small_of("vp"), []
    model.network.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    row = drawn(1, seed=0)
    densities(model, row, QUERY, seed=0, progress=silent)
    cosine = torch.nn.functional.cosine_similarity(seen[0].flatten(1), row.flatten(1))
    torch.testing.assert_close(cosine, torch.full((4,), (1 - QUERY.weight**2) ** 0.5), rtol=0, atol=0.07)


def test_the_threshold_is_the_highest_clean_density_that_the_rate_allows() -> None:
    reference = torch.arange(1, 100, dtype=torch.float64) / 100
    p_values, threshold = compare(torch.tensor([0.995, 0.99, 0.955, 0.945, 0.0], dtype=torch.float64), reference, 0.05)
    assert p_values.tolist() == pytest.approx([0.01, 0.02, 0.05, 0.06, 1.0])
    assert threshold == 0.95


@pytest.mark.parametrize(("rate", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.003, 333), (0.001, 999)])
def test_a_rate_needs_so_many_clean_noises(rate: float, needed: int) -> None:
    assert references(rate) == needed
    reference = torch.linspace(1, 0, needed)
    p_values, threshold = compare(torch.tensor([2.0]), reference, rate)
    assert p_values.item() <= rate and threshold == 1
    with pytest.raises(InputError, match=f"at least {needed}"):
        compare(torch.tensor([2.0]), reference[1:], rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match="false-positive rate"):
        references(rate)


@pytest.mark.parametrize("options", [{"variants": 1}, {"weight": 0.0}, {"weight": 1.0}])
def test_a_query_that_compares_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="at least 2"):
        Query(sampler="DDIM-SCHED", steps=5, **options)  # type: ignore[arg-type]


def test_a_sampler_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="EULER"):
        densities(CLEAN, drawn(1), Query(sampler="EULER", steps=5), seed=0, progress=silent)


def test_a_model_that_paints_no_numbers_is_an_error() -> None:
    broken = CLEAN.clone()
    broken.network.drift.data.fill_(math.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(FloatingPointError, match="not finite"):
        densities(broken, drawn(1), QUERY, seed=0, progress=silent)
