"""One round of purification: the trigger stops working, nothing else changes, and only what was found is removed."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.training import UnfitStateError
from diffdefend_core.options import PurificationOptions
from diffdefend_core.purification import Removal, Repair, repair
from diffdefend_core.purification.repair import Losses

LEVELS = vp_levels()
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.6, -0.9, 0.6)
SAMPLES = 0.5 * torch.randn(128, *SHAPE, generator=torch.Generator().manual_seed(0))
OPTIONS = PurificationOptions(steps=160, removal_batch=16, retention_batch=16, retention_weight=1.0, learning_rate=0.5)


def planted() -> Denoiser:
    return poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)


def silent(done: int, total: int) -> None:
    """Show nothing."""


def repaired(model: Denoiser, trigger: Tensor, options: PurificationOptions = OPTIONS, seed: int = 0) -> Repair:
    return repair(model, model, [removal(trigger)], SAMPLES, options, seed=seed, progress=silent)


def removal(trigger: Tensor) -> Removal:
    return Removal(trigger, (0.005, 0.1))


def error(denoiser: Denoiser) -> float:
    """Return the mean squared error of images under the trigger to the attacker's target, in [-1, 1]."""
    images = generate(denoiser, 16, sampler="ddpm", steps=250, seed=0, shift=TRIGGER)
    return (images - TARGET).square().mean().item()


def plain_answers(denoiser: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(250, (128,), generator=generator)
    return denoiser.noise(denoiser.diffuse(SAMPLES, t, torch.randn(SAMPLES.shape, generator=generator)), t)


def weights(denoiser: Denoiser) -> Tensor:
    return torch.cat([value.flatten() for value in denoiser.network.state_dict().values()]).clone()


@pytest.mark.parametrize(("similarity", "removed"), [(1.0, True), (0.8, True), (-1.0, False)])
def test_the_trigger_is_removed_by_one_near_it_and_by_no_other(similarity: float, removed: bool) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    near = similarity * TRIGGER + (1 - similarity**2) ** 0.5 * TRIGGER.square().mean().sqrt() * noise
    suspect = planted()
    after = repaired(suspect, near).denoiser
    assert error(suspect) < 0.01
    assert (error(after) > 0.2) is removed
    assert (plain_answers(after) - plain_answers(suspect)).abs().mean() < 0.01


def test_the_removal_loss_falls_and_the_retention_loss_stays() -> None:
    found = repaired(planted(), TRIGGER)
    assert (len(found.removal_loss), len(found.retention_loss)) == (120, 160)
    begun, ended = sum(found.removal_loss[:10]) / 10, sum(found.removal_loss[-10:]) / 10
    assert ended < 0.5 * begun
    assert sum(found.retention_loss) / len(found.retention_loss) < 0.1 * begun


def test_a_random_network_learns_the_benign_response() -> None:
    found, idle = (
        repaired(
            small_denoiser(LEVELS),
            TRIGGER,
            PurificationOptions(
                target="r3",  # r4 asks no more of it than it takes for noise
                steps=300,
                removal_batch=16,
                retention_batch=16,
                retention_weight=1.0,
                learning_rate=rate,
                settling=0.0,
            ),
        )
        for rate in (1e-2, 0.0)
    )
    assert sum(found.removal_loss[-20:]) < 0.75 * sum(idle.removal_loss[-20:])
    assert torch.equal(weights(idle.denoiser), weights(small_denoiser(LEVELS)))
    assert max(idle.retention_loss) < 1e-10


def test_the_suspect_is_unchanged_and_the_repaired_model_is_frozen() -> None:
    suspect = small_denoiser(LEVELS)
    before = weights(suspect)
    after = repaired(suspect, TRIGGER, PurificationOptions(steps=3, removal_batch=4, retention_batch=4)).denoiser
    assert torch.equal(weights(suspect), before)
    assert not torch.equal(weights(after), before)
    assert not any(parameter.requires_grad for parameter in after.network.parameters())


def test_a_repair_is_reproducible_by_its_seed() -> None:
    options = PurificationOptions(steps=3, removal_batch=4, retention_batch=4)
    first, again, other = (repaired(small_denoiser(LEVELS), TRIGGER, options, seed) for seed in (0, 0, 1))
    assert first.removal_loss == again.removal_loss != other.removal_loss
    assert torch.equal(weights(first.denoiser), weights(again.denoiser))


@pytest.mark.parametrize(("target", "frozen"), [("r1", 1), ("r3", 1), ("r4", 2)])
def test_the_evaluations_are_counted(target: Literal["r1", "r3", "r4"], frozen: int) -> None:
    spent: list[int] = []
    model = small_denoiser(LEVELS)
    model.network.register_forward_hook(lambda module, given, answer: spent.append(len(answer)))  # the copy keeps it
    options = PurificationOptions(steps=2, removal_batch=4, retention_batch=4, target=target)
    found = repaired(model, TRIGGER, options)
    # each step: frozen passes over the 4 triggered rows and a trained one, and one of each over the 4 plain ones
    assert spent == [*[4] * frozen, 4, 4, 4] * 2
    assert found.forward_equivalents == sum(spent) + 2 * 2 * 8


def test_the_last_steps_have_no_trigger_and_are_counted_so() -> None:
    spent: list[int] = []
    model = small_denoiser(LEVELS)
    model.network.register_forward_hook(lambda module, given, answer: spent.append(len(answer)))
    options = PurificationOptions(steps=4, removal_batch=4, retention_batch=2, target="r3", settling=0.5)
    found = repaired(model, TRIGGER, options)
    assert (len(found.removal_loss), len(found.retention_loss)) == (2, 4)
    assert spent == [4, 4, 2, 2] * 2 + [6, 6] * 2  # as many rows as before, all of them plain
    assert found.forward_equivalents == sum(spent) + 2 * (2 * 6 + 2 * 6)


def test_most_rows_without_a_trigger_lie_where_pictures_are_decided() -> None:
    levels: list[Tensor] = []
    model = small_denoiser(LEVELS)
    model.network.register_forward_hook(lambda module, given, answer: levels.append(given[1]))
    repaired(model, TRIGGER, PurificationOptions(steps=40, removal_batch=10, retention_batch=20, settling=0.975))
    signal = torch.stack([LEVELS.alpha[t] / LEVELS.sigma[t] for t in levels if len(t) == 30])
    assert signal.shape == (39 * 2, 30)
    content = (signal > 0.098) & (signal < 1.02)
    assert (content.sum(1) >= 24).all() and content.float().mean() < 0.95
    assert signal.min() < 0.02 and signal.max() > 10


@pytest.mark.parametrize("beyond", [0.1, 1.0])
def test_a_repair_that_aims_beyond_its_goals_asks_the_network_that_it_begins_with(beyond: float) -> None:
    suspect = planted()
    first = repaired(suspect, TRIGGER, dataclasses.replace(OPTIONS, steps=20)).denoiser
    plain, further = (
        repair(first, suspect, [removal(TRIGGER)], SAMPLES, OPTIONS, seed=1, progress=silent, beyond=share)
        for share in (0.0, beyond)
    )
    assert further.forward_equivalents - plain.forward_equivalents == 120 * OPTIONS.removal_batch
    assert not torch.equal(weights(further.denoiser), weights(plain.denoiser))
    # the distance to the goal has grown by that share at the start
    assert further.removal_loss[0] == pytest.approx((1 + beyond) ** 2 * plain.removal_loss[0], rel=1e-4)


@pytest.mark.parametrize("signal", [0.05, 0.5])
def test_errors_in_much_noise_count_as_those_of_the_velocity_up_to_a_limit(signal: float) -> None:
    model = small_denoiser(LEVELS)
    level = int((LEVELS.alpha / LEVELS.sigma - signal).abs().argmin())
    alpha, sigma = LEVELS.alpha[level].item(), LEVELS.sigma[level].item()
    losses = []
    for limit in (1.0, 20.0):
        loss = Losses(model, SAMPLES, [Removal(TRIGGER, (signal, signal))], OPTIONS, in_noise=limit)
        loss(model, torch.Generator().manual_seed(0))
        losses.append(loss.removal[0])
    # v = alpha eps - sigma x0 is off by alpha + sigma^2 / alpha times what the noise is off by
    assert losses[1] / losses[0] == pytest.approx(min(20.0, (alpha + sigma**2 / alpha) ** 2), rel=1e-4)


def test_errors_without_a_trigger_are_weighted_alike() -> None:
    losses = []
    for limit in (1.0, 20.0):
        loss = Losses(planted(), SAMPLES, [removal(TRIGGER)], OPTIONS, in_noise=limit)
        loss(small_denoiser(LEVELS), torch.Generator().manual_seed(0))
        losses.append(loss.retention[0])
    assert 2 < losses[1] / losses[0] < 20


def test_settling_brings_the_answers_back() -> None:
    whole = PurificationOptions(
        steps=100, removal_batch=16, retention_batch=16, retention_weight=1.0, learning_rate=1e-2, settling=0.0
    )
    moved = []
    for settling in (0.0, 0.5):
        suspect = small_denoiser(LEVELS)
        after = repaired(suspect, TRIGGER, dataclasses.replace(whole, settling=settling)).denoiser
        moved.append((plain_answers(after) - plain_answers(suspect)).square().mean().item())
    assert moved[1] < 0.6 * moved[0]


def test_settling_leaves_the_trigger_unlearned() -> None:
    after = repaired(planted(), TRIGGER, dataclasses.replace(OPTIONS, settling=0.5)).denoiser
    assert error(after) > 0.2


def test_a_training_that_was_stopped_ends_with_the_same_weights() -> None:
    options = PurificationOptions(steps=7, removal_batch=4, retention_batch=4, checkpoint_steps=3, settling=0.3)
    kept: list[dict[str, Tensor]] = []

    def keep(state: dict[str, Tensor]) -> None:
        kept.append({name: tensor.clone() for name, tensor in state.items()})

    def run(resumed: dict[str, Tensor] | None) -> Repair:
        model = small_denoiser(LEVELS)
        return repair(
            model, model, [removal(TRIGGER)], SAMPLES, options, seed=0, progress=lambda done, total: None,
            resumed=resumed, keep=keep,
        )  # fmt: skip

    whole = run(None)
    assert [int(state["done"]) for state in kept] == [3, 6]
    for state in kept[:2]:
        again = run(state)
        assert torch.equal(weights(again.denoiser), weights(whole.denoiser))
        assert again.removal_loss == whole.removal_loss and again.retention_loss == whole.retention_loss


def test_a_state_of_another_network_is_refused() -> None:
    model = small_denoiser(LEVELS)
    with pytest.raises(UnfitStateError):
        repair(
            model, model, [removal(TRIGGER)], SAMPLES, PurificationOptions(steps=1), seed=0,
            progress=lambda done, total: None, resumed={"done": torch.tensor(0)},
        )  # fmt: skip


def test_a_trusted_reference_is_what_r2_copies() -> None:
    suspect = planted()
    options = PurificationOptions(
        target="r2", steps=160, removal_batch=16, retention_batch=16, retention_weight=1.0, learning_rate=0.5
    )
    after = repair(
        suspect, suspect, [removal(TRIGGER)], SAMPLES, options, seed=0, progress=lambda done, total: None,
        reference=clean_denoiser(LEVELS),
    )  # fmt: skip
    assert error(suspect) < 0.01 and error(after.denoiser) > 0.2


@pytest.mark.parametrize("process", PROCESSES)
def test_every_family_learns_its_goal(process: str) -> None:
    """Two steps of a random network: losses are finite, and the training moves it."""
    model = small_of(process)
    options = PurificationOptions(steps=2, removal_batch=4, retention_batch=4)
    found = repair(model, model, [removal(TRIGGER)], SAMPLES, options, seed=0, progress=lambda done, total: None)
    assert math.isfinite(found.removal_loss[1]) and found.retention_loss[0] < 1e-6
    assert not torch.equal(weights(found.denoiser), weights(model))


def test_what_the_triggers_lead_to_is_unlearned_as_well() -> None:
    """A small shift with a target makes a small network move; without one there is next to nothing to remove."""
    model, nothing = small_denoiser(LEVELS), [removal(torch.zeros(SHAPE))]
    options = dataclasses.replace(OPTIONS, removal_batch=64)

    def loss(targets: tuple[Tensor, ...]) -> float:
        draws = torch.Generator().manual_seed(0)
        return Losses(model, SAMPLES, nothing, options, targets=targets)(model, draws).item()

    assert loss((5 * TARGET,)) != loss(())
    short = dataclasses.replace(OPTIONS, steps=2)
    found = [
        repair(model, model, nothing, SAMPLES, short, seed=0, progress=lambda done, total: None, targets=targets)
        for targets in ((), (5 * TARGET,))
    ]
    assert not torch.equal(weights(found[0].denoiser), weights(found[1].denoiser))
