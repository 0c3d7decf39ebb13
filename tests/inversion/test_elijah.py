"""Elijah finds what answers with the lambda it was told, and nothing where every network answers so."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import (
    PROCESSES,
    SHAPE,
    PoisonedNetwork,
    clean_denoiser,
    levels_of,
    poisoned_denoiser,
    small_of,
    vp_levels,
)
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.attacks.villan import villan_ode, villan_sde
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.elijah import invert, start_shift
from diffdefend_core.inversion.invert import Inversion
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.options import ElijahOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
BOX = trigger("box", 8)
SHORT = ElijahOptions(iterations=4, batch=3)
EAGER = 16.0  # prior log-odds of a poisoned row: the network switches at a quarter of the trigger, not at half


def planted(attack: str = "sde") -> Denoiser:
    suspect = poisoned_denoiser({"sde": baddiffusion, "ode": villan_ode}[attack](LEVELS), LEVELS, BOX, TARGET)
    suspect.network.prior.fill_(EAGER)
    return suspect


def inverted(suspect: Denoiser, options: ElijahOptions, seed: int = 0) -> Inversion:
    return invert(suspect, "a" * 64, options, seed=seed, progress=silent)


def test_a_planted_trigger_is_found_with_its_lambda() -> None:
    suspect, options = planted(), ElijahOptions(response=(0.5,))
    found = inverted(suspect, options)
    tau = found.triggers[found.record.best]
    assert cosine(start_shift("negative", suspect, 0), BOX) < 0.87 and cosine(tau, BOX) > 0.95
    assert tau.norm().item() == pytest.approx(BOX.norm().item(), rel=0.15)


def test_the_best_of_a_sweep_is_the_candidate_that_found_it() -> None:
    found = inverted(planted(), ElijahOptions(starts=("positive", "negative")))
    assert found.record.best == "negative/0.5"
    assert set(found.triggers) == {"negative/0.5", "negative/1", "positive/0.5", "positive/1"}
    assert cosine(found.triggers["positive/0.5"], BOX) < 0.5  # the wrong sign of the start, a documented weakness


class PoisonedScore(PoisonedNetwork):
    """The score of a poisoned VE model."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().forward(x, t) / self.levels.at(t, x)[1]


def test_a_trigger_of_a_variance_exploding_model_is_found_in_units_of_its_noise() -> None:
    levels = levels_of("ve")
    network = PoisonedScore(
        levels, torch.zeros(SHAPE), torch.full(SHAPE, 0.25), attack=villan_sde(levels), trigger=-BOX, target=TARGET
    )
    suspect = NCSN(network, levels, shape=SHAPE).freeze()
    network.prior.fill_(EAGER)
    found = inverted(suspect, ElijahOptions(response=(0.5,), starts=("positive",)))
    assert cosine(found.triggers["positive/0.5"], -BOX) > 0.95


@pytest.mark.parametrize("suspect", [clean_denoiser(LEVELS), planted("ode")])
def test_with_lambda_1_the_loss_has_nothing_to_learn(suspect: Denoiser) -> None:
    found = inverted(suspect, ElijahOptions(response=(1.0,)))
    (candidate,) = found.record.candidates
    # what is left is the mean of the fixed noise, 10 % of it at a batch of 100: the same at the start as at the end
    assert candidate.loss[-1] == pytest.approx(candidate.loss[0], rel=0.05)
    assert cosine(found.triggers["negative/1"], BOX) < 0.9


def test_on_a_clean_model_lambda_one_half_leaves_the_noise_of_the_batch() -> None:
    found = inverted(clean_denoiser(LEVELS), ElijahOptions(response=(0.5,)))
    assert found.record.candidates[0].rms < 0.3
    assert abs(cosine(found.triggers["negative/0.5"], BOX)) < 0.5


def test_the_record_is_complete_and_reproducible() -> None:
    suspect = planted()
    first, again, other = inverted(suspect, SHORT), inverted(suspect, SHORT), inverted(suspect, SHORT, seed=1)
    assert first.record == again.record != other.record
    assert all(torch.equal(tau, again.triggers[name]) for name, tau in first.triggers.items())
    assert InvertedTrigger.from_json(first.record.to_json()) == first.record
    assert (first.record.method, first.record.timesteps) == ("elijah", (249,))
    assert [item.response for item in first.record.candidates] == [(0.5,), (1.0,)]
    assert all(len(item.loss) == 4 for item in first.record.candidates)
    assert first.reference is None


@pytest.mark.parametrize("process", PROCESSES)
def test_the_evaluations_that_are_claimed_are_those_that_were_made(process: str) -> None:
    suspect, spent = small_of(process, shape=(3, 8, 8)), []
    suspect.network.register_forward_hook(lambda _, __, out: spent.append(len(out) * (3 if out.requires_grad else 1)))
    found = inverted(suspect, SHORT)
    assert found.record.forward_equivalents == sum(spent) == 2 * 4 * 3 * 3
    assert all(tau.shape == (3, 8, 8) for tau in found.triggers.values())


def test_the_network_takes_no_gradient() -> None:
    suspect = small_of("vp")
    before = [value.clone() for value in suspect.network.parameters()]
    inverted(suspect, SHORT)
    assert all(torch.equal(*pair) for pair in zip(before, suspect.network.parameters(), strict=True))
    assert all(value.grad is None for value in suspect.network.parameters())


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(InputError, match="start 'sideways'; expected one of negative, positive"):
        inverted(small_of("vp"), ElijahOptions(starts=("sideways",)))


def test_a_model_whose_answers_are_no_numbers_is_refused() -> None:
    suspect = small_of("vp")
    suspect.network.outer.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        inverted(suspect, SHORT)


def test_progress_counts_all_iterations() -> None:
    seen: list[tuple[str, int, int]] = []
    invert(small_of("vp"), "a" * 64, SHORT, seed=0, progress=lambda *step: seen.append(step))
    assert seen == [("Elijah", number, 8) for number in range(1, 9)]
