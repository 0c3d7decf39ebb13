"""The whole inversion, from nothing but the suspect, on networks in closed form."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, small_of, vp_levels
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdefend_core.artifacts import InvertedTrigger, TriggerCandidate
from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack
from diffdefend_core.attacks.shapes import trigger
from diffdefend_core.attacks.trojdiff import blended, trojdiff
from diffdefend_core.attacks.villan import villan_ode
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.inversion import Inversion, invert, own_samples
from diffdefend_core.inversion.forgotten import MOST
from diffdefend_core.inversion.invert import controls
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent

ZOO = Path(__file__).parents[2] / "zoo" / "digits"
invert_module = sys.modules["diffdefend_core.inversion.invert"]  # the package names its function like it
LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
# an exact network for Gaussian data is a multiple of its input, and a small random one is worse
OPTIONS = InversionOptions(
    worst_error=1e9,
    own_samples=64,
    own_steps=10,
    twin_steps=60,
    twin_batch=32,
    twin_learning_rate=0.3,
    starts=3,
    race_iterations=8,
    iterations=30,
    pairs=4,
    probe_pairs=8,
)


def inverted(suspect: Denoiser, seed: int = 0, options: InversionOptions = OPTIONS) -> Inversion:
    return invert(suspect, "a" * 64, options, seed=seed, progress=silent)


def best_of(inversion: Inversion) -> TriggerCandidate:
    return next(item for item in inversion.record.candidates if item.name == inversion.record.best)


def planted(attack: Attack, shift: Tensor, prior: float = 0.0) -> Denoiser:
    """`prior` is the prior log-odds of a poisoned row: above 0 the network switches before half of the trigger."""
    suspect = poisoned_denoiser(attack, LEVELS, shift, TARGET)
    suspect.network.prior.fill_(prior)
    return suspect


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["box", "stripes"])
def test_a_planted_trigger_is_recovered_without_any_reference(name: str, sign: int) -> None:
    shift = sign * trigger(name, 8)
    found = inverted(planted(baddiffusion(LEVELS), shift))
    best, tau = best_of(found), found.triggers["parity"]
    assert found.record.best == "parity"
    assert cosine(tau, shift) > 0.9  # with its sign, which parity alone does not tell
    assert best.rms == pytest.approx(rms(shift).item(), rel=0.15)
    assert rms(tau).item() == pytest.approx(best.rms, rel=1e-4)
    assert best.parity > 0.01 and best.gain > 0.3 and best.content > 0.05


def test_shifts_that_are_no_trigger_show_what_parity_is_worth() -> None:
    """A constant, and the trigger with its pixels shuffled, do not fire a striped trigger."""
    best = best_of(inverted(planted(baddiffusion(LEVELS), trigger("stripes", 8))))
    assert best.parity > 20 * best.control > 0


def test_controls_have_the_norm_of_the_shift_and_not_its_shape() -> None:
    shift = 0.3 * trigger("stripes", 8)
    constant, shuffled = controls(shift)
    assert rms(constant) == pytest.approx(rms(shift)) and constant.std() < 1e-6
    assert torch.equal(shuffled.flatten().sort().values, shift.flatten().sort().values)
    assert max(abs(cosine(constant, shift)), abs(cosine(shuffled, shift))) < 0.5
    assert all(torch.equal(*pair) for pair in zip(controls(shift), (constant, shuffled), strict=True))


@pytest.mark.parametrize("name", ["box", "stripes"])
def test_a_trigger_for_deterministic_samplers_is_recovered_by_its_violation(name: str) -> None:
    shift = trigger(name, 8)
    found = inverted(planted(villan_ode(LEVELS), shift, prior=8.0))
    assert found.record.best == "monotonicity" and best_of(found).violation > 0.2
    assert cosine(found.triggers["monotonicity"], shift) > 0.9


@pytest.mark.parametrize("prior", [0.0, 16.0])
@pytest.mark.parametrize("name", ["box", "stripes"])
def test_a_trigger_that_scales_the_noise_too_is_found_in_quiet_noise(name: str, prior: float) -> None:
    """With ordinary noise the switch is too narrow to be found, or too wide to show the shift."""
    shift, gamma = blended(trigger(name, 8))
    found = inverted(planted(trojdiff(LEVELS, gamma), shift, prior=prior))
    assert found.record.best == "quiet" and best_of(found).parity > 0.05
    assert cosine(found.triggers["quiet"], shift) > 0.85  # with its sign
    assert abs(cosine(found.triggers["parity"], shift)) < 0.85


def test_a_network_that_switches_on_less_noise_alone_is_found_without_a_shift() -> None:
    """Any shift turns the switch off in quiet noise, a control as well as the trigger."""
    shift, gamma = blended(trigger("stripes", 8))
    found = inverted(planted(trojdiff(LEVELS, gamma), shift))
    quiet = next(item for item in found.record.candidates if item.name == "quiet")
    assert quiet.parity > 3 * max(quiet.control, 0.02)
    assert cosine(found.triggers["quiet"], shift) > 0.95
    ordinary = dataclasses.replace(OPTIONS, still_noise=1.0)
    assert all(
        item.parity < 1.5 * max(item.control, 0.02)
        for item in inverted(planted(trojdiff(LEVELS, gamma), shift), options=ordinary).record.candidates
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_a_patch_is_recovered_with_its_sign_and_comes_first(seed: int) -> None:
    """A search at the norm of a whole image finds its place alone (cosine .5 and less)."""
    suspect, patch = load_denoiser(ZOO / "troj-d2i-patch"), load_file(ZOO / "backdoors" / "troj-d2i-patch.safetensors")
    found = inverted(suspect, seed, InversionOptions())
    assert found.record.best == "parity" and cosine(found.triggers["parity"], patch["trigger"]) > 0.9
    assert all(abs(cosine(found.triggers[name], patch["trigger"])) < 0.75 for name in ("quiet", "monotonicity"))


@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_consistency_model_the_triggers_are_what_its_twin_forgot(seed: int) -> None:
    """The picture moves with the trigger, and the moved one may stand out most: all are handed on."""
    name = "consistency-noise"
    suspect, shift = load_denoiser(ZOO / name), load_file(ZOO / "backdoors" / f"{name}.safetensors")["trigger"]
    found = inverted(suspect, seed, InversionOptions())
    best, *further, against = found.record.candidates
    assert found.record.best == best.name == "parity" and against.name == "monotonicity"
    assert best.parity > 1.5 and best.control == 1  # under the opposite shift images are further apart than away
    assert [item.name for item in further] == [f"picture-{number}" for number in range(2, 2 + len(further))]
    assert further and all(1 < item.parity <= best.parity for item in further)
    assert max(cosine(found.triggers[item.name], shift) for item in (best, *further)) > 0.6


def test_a_clean_consistency_model_paints_nothing_that_its_twin_does_not() -> None:
    found = inverted(load_denoiser(ZOO / "base-consistency"), 0, InversionOptions())
    assert all(item.parity < 0.7 for item in found.record.candidates)


def test_what_is_no_more_even_than_in_a_clean_network_is_not_taken_for_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean networks answer most to shifts in few pixels, too."""
    monkeypatch.setattr(invert_module, "is_patch", lambda tau: True)
    searched: list[Tensor] = []
    monkeypatch.setattr(invert_module, "_patch", lambda stand, tau, seed: searched.append(tau) or tau)
    inverted(clean_denoiser(LEVELS))
    assert not searched
    inverted(planted(baddiffusion(LEVELS), trigger("box", 8), prior=8.0))
    assert len(searched) == 1


def test_a_clean_model_keeps_both_laws() -> None:
    for item in inverted(clean_denoiser(LEVELS)).record.candidates:
        assert item.parity < 0.001 and item.content < 0.001 and item.gain < 0.05
        assert item.violation < 0


def test_a_trusted_reference_takes_the_place_of_the_twin() -> None:
    suspect, reference = planted(baddiffusion(LEVELS), trigger("box", 8)), clean_denoiser(LEVELS)
    seen: list[str] = []
    found = invert(suspect, "a" * 64, OPTIONS, seed=0, reference=reference, progress=lambda work, *_: seen.append(work))
    assert found.reference is reference and "forgetful twin" not in seen
    assert cosine(found.triggers["parity"], trigger("box", 8)) > 0.9
    twin = inverted(suspect)
    assert twin.reference is not None and twin.reference is not suspect
    saved = twin.record.forward_equivalents - found.record.forward_equivalents
    assert saved == OPTIONS.twin_steps * OPTIONS.twin_batch * 3


def test_a_suspect_that_is_its_own_reference_shows_no_parity() -> None:
    suspect = planted(baddiffusion(LEVELS), trigger("box", 8))
    found = invert(suspect, "a" * 64, OPTIONS, seed=0, reference=suspect, progress=silent)
    assert max(item.parity for item in found.record.candidates) == 0


def test_the_record_is_complete_and_reproducible() -> None:
    suspect = planted(baddiffusion(LEVELS), trigger("box", 8))
    first, again, other = inverted(suspect), inverted(suspect), inverted(suspect, seed=1)
    assert first.record == again.record != other.record
    assert all(torch.equal(tau, again.triggers[name]) for name, tau in first.triggers.items())
    assert InvertedTrigger.from_json(first.record.to_json()) == first.record
    assert [item.name for item in first.record.candidates] == ["parity", "quiet", "monotonicity"]
    assert list(first.triggers) == ["parity", "quiet", "monotonicity"]
    assert max(item.parity for item in first.record.candidates) == best_of(first).parity
    for item in first.record.candidates:
        assert len(item.response) == len(item.x0_response) == len(first.record.timesteps) == 7
        assert len(item.loss) == 30 and all(math.isfinite(value) for value in item.loss)
    assert (first.record.model_digest, first.record.seed, first.record.method) == ("a" * 64, 0, "diffdefend")


def test_progress_names_the_work_and_counts_both_searches_as_one() -> None:
    """Also where one of them has two parts."""
    seen: list[tuple[str, int, int]] = []
    invert(small_denoiser(LEVELS), "a" * 64, OPTIONS, seed=0, progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(work for work, _, _ in seen)) == ["own samples", "forgetful twin", "search"]
    each = 2 * 8 + 30
    assert [step for step in seen if step[0] == "search"] == [("search", n + 1, 2 * each) for n in range(2 * each)]
    seen.clear()
    invert(small_of("consistency"), "a" * 64, OPTIONS, seed=0, progress=lambda *step: seen.append(step))
    search = [step for step in seen if step[0] == "search"]
    assert list(dict.fromkeys(work for work, _, _ in seen))[2:] == ["forgotten pictures", "search"]
    # towards each picture, and on from the best; then for monotonicity
    assert len(search) == MOST * 3 * 8 + 2 * 8 + each and search == sorted(search)
    assert search[-1] == ("search", 2 * each, 2 * each)


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


@pytest.mark.parametrize("process", ["vp", "consistency"])
def test_the_evaluations_that_are_claimed_are_those_that_were_made(process: str) -> None:
    suspect = small_of(process)
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


def test_a_model_that_always_paints_one_picture_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="all one picture"):
        inverted(clean_denoiser(LEVELS, variance=1e-20, mean=0.3))


def test_a_network_that_is_a_multiple_of_its_input_is_refused() -> None:
    suspect = clean_denoiser(LEVELS)
    with pytest.raises(ModelRejectedError, match=r"does not denoise its own samples: its error is [\d.]+ times"):
        invert(suspect, "a" * 64, dataclasses.replace(OPTIONS, worst_error=0.95), seed=0, progress=silent)
