"""The whole inversion, from nothing but the suspect, on networks in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.inversion import Inversion, invert, own_samples
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
OPTIONS = InversionOptions(
    own_samples=64,
    own_steps=10,
    twin_steps=60,
    twin_batch=32,
    twin_learning_rate=0.3,
    starts=3,
    finalists=2,
    race_iterations=8,
    iterations=25,
    pairs=4,
    probe_pairs=8,
)


def inverted(suspect: Denoiser, seed: int = 0, options: InversionOptions = OPTIONS) -> Inversion:
    return invert(suspect, "a" * 64, options, seed=seed, progress=silent)


def best_of(inversion: Inversion) -> TriggerCandidate:
    return next(item for item in inversion.record.candidates if item.name == inversion.record.best)


@pytest.mark.parametrize("name", ["box", "stripes"])
def test_a_planted_trigger_is_recovered_without_any_reference(name: str) -> None:
    shift = trigger(name, 8)
    found = inverted(poisoned_denoiser(baddiffusion(LEVELS), LEVELS, shift, TARGET))
    best, tau = best_of(found), found.triggers[found.record.best]
    assert cosine(tau, shift) > 0.9
    assert best.rms == pytest.approx(rms(shift).item(), rel=0.15)
    assert rms(tau).item() == pytest.approx(best.rms, rel=1e-4)
    assert best.gain > 0.3


def test_a_clean_model_treats_every_shift_as_noise() -> None:
    best = best_of(inverted(clean_denoiser(LEVELS)))
    assert best.gain < 0.05 and best.difference < 0.01


def test_the_record_is_complete_and_reproducible() -> None:
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, trigger("box", 8), TARGET)
    first, again, other = inverted(suspect), inverted(suspect), inverted(suspect, seed=1)
    assert first.record == again.record != other.record
    assert InvertedTrigger.from_json(first.record.to_json()) == first.record
    assert {item.name for item in first.record.candidates} == set(first.triggers)
    assert max(item.difference for item in first.record.candidates) == best_of(first).difference
    for item in first.record.candidates:
        assert len(item.response) == len(item.x0_response) == len(first.record.timesteps) == 7
        assert len(item.loss) == 25 and all(math.isfinite(value) for value in item.loss)
    assert (first.record.model_digest, first.record.seed) == ("a" * 64, 0)


def test_the_suspect_stays_as_it_was() -> None:
    suspect = small_denoiser(LEVELS)
    before = [value.clone() for value in suspect.network.state_dict().values()]
    found = inverted(suspect)
    assert all(torch.equal(*pair) for pair in zip(before, suspect.network.state_dict().values(), strict=True))
    assert found.reference is not suspect


class Counting(nn.Module):
    """Counts the rows that go through a network: 1 forward, 3 forward and backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, torch.zeros((), dtype=torch.int64)

    def __deepcopy__(self, memo: dict[int, object]) -> Counting:
        import copy

        twin = Counting(copy.deepcopy(self.inner, memo))
        twin.seen = self.seen  # what the twin computes is spent too
        return twin

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = self.inner(x, t)
        self.seen += len(x) * (3 if answer.requires_grad else 1)
        return answer


def test_the_evaluations_that_are_claimed_are_those_that_were_made() -> None:
    suspect = small_denoiser(LEVELS)
    suspect.network = Counting(suspect.network)
    claimed, made = inverted(suspect).record.forward_equivalents, int(suspect.network.seen)
    assert 0.8 * claimed < made <= claimed


def test_own_samples_are_finite_and_in_range() -> None:
    samples = own_samples(clean_denoiser(LEVELS, variance=4.0), 16, 10, 0, silent)
    assert samples.shape == (16, *SHAPE) and samples.min() == -1 and samples.max() == 1
    assert not torch.equal(samples, own_samples(clean_denoiser(LEVELS, variance=4.0), 16, 10, 1, silent))


def test_a_model_that_paints_no_numbers_is_refused() -> None:
    suspect = small_denoiser(LEVELS)
    suspect.network.outer.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="own samples are not finite"):
        inverted(suspect)
