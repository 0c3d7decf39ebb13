"""Planting and firing: training in place, the learned trigger, and initial noise that carries it."""

from __future__ import annotations

import pytest
import torch
from analytic import PROCESSES, SHAPE, clean_denoiser, poisoned_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.invibackdoor import BOUND
from diffdefend_core.attacks.plans import Scene, plan
from diffdefend_core.attacks.plant import INNER_EVERY, fire, plant
from diffdefend_core.attacks.trojdiff import trojdiff
from diffdefend_core.attacks.villan import villan_sde
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError

LEVELS = vp_levels(100)
PICTURE = torch.where(torch.arange(8)[:, None] % 4 < 2, 0.9, 0.1).expand(SHAPE)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
DATA = 0.4 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
NAMES = {"vp": "villan-ode", "ve": "villan-sde", "flow": "trojflow-d2i-patch", "consistency": "consistency-backdoor"}


def backdoor_for(denoiser: Denoiser, name: str) -> Backdoor:
    return plan(name, Scene(denoiser=denoiser, trigger=PICTURE, targets=(TARGET[None] + 1) / 2, data=DATA))


def planted(denoiser: Denoiser, backdoor: Backdoor, *, steps: int, seed: int = 0, rate: float = 0.5) -> list[float]:
    losses = plant(
        denoiser, backdoor, DATA, steps=steps, batch=16, poison_rate=rate, learning_rate=1e-2, seed=seed
    )  # fmt: skip
    return list(losses)


def weights(denoiser: Denoiser) -> Tensor:
    return torch.cat([value.flatten() for value in denoiser.network.state_dict().values()]).clone()


@pytest.mark.parametrize("process", PROCESSES)
def test_a_model_of_every_process_is_trained_in_place_and_frozen(process: str) -> None:
    model = small_of(process)
    before = weights(model)
    losses = planted(model, backdoor_for(model, NAMES[process]), steps=4)
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    assert not torch.equal(weights(model), before)
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_the_poisoned_loss_falls(process: str) -> None:
    model = small_of(process)
    losses = planted(model, backdoor_for(model, NAMES[process]), steps=120)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize("name", ["villan-ode", "invibackdoor"])
def test_planting_is_reproducible_by_its_seed(name: str) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = small_of("vp")
        runs.append((planted(model, backdoor_for(model, name), steps=3, seed=seed), weights(model)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_invisible_trigger_is_learned_on_the_way_within_its_bound() -> None:
    model = small_of("vp")
    backdoor = backdoor_for(model, "invibackdoor")
    seen = []
    for _ in plant(model, backdoor, DATA, steps=9, batch=8, poison_rate=0.5, learning_rate=1e-3, seed=0):
        seen.append(backdoor.trigger.detach().clone())
    moved = [not torch.equal(*pair) for pair in zip([torch.zeros(SHAPE), *seen], seen, strict=False)]
    assert moved == [number % INNER_EVERY == 0 for number in range(9)]
    assert 0 < seen[-1].abs().max() <= BOUND


def test_a_trigger_that_is_given_stays_as_it_is() -> None:
    model = small_of("vp")
    backdoor = backdoor_for(model, "baddiffusion")
    before = backdoor.trigger.clone()
    planted(model, backdoor, steps=2)
    assert torch.equal(backdoor.trigger, before)


def analytic(kind: str) -> tuple[Denoiser, Backdoor]:
    """Return the perfect backdoored model of an attack with gamma 1, and its backdoor."""
    attack = {"villan": villan_sde(LEVELS), "trojan": trojdiff(LEVELS, 1.0)}[kind]
    trigger = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
    sampler = {"villan": "DDPM-SCHED", "trojan": "TROJDIFF-DDPM"}[kind]
    backdoor = Backdoor(attack=attack, trigger=trigger, targets=TARGET[None], sampler=sampler)
    return poisoned_denoiser(attack, LEVELS, trigger, TARGET), backdoor


@pytest.mark.parametrize("kind", ["villan", "trojan"])
def test_firing_paints_the_target_in_a_planted_model_and_not_in_a_clean_one(kind: str) -> None:
    model, backdoor = analytic(kind)
    painted, control = (
        fire(denoiser, backdoor, 4, sampler=backdoor.sampler, steps=1000, seed=0)
        for denoiser in (model, clean_denoiser(LEVELS))
    )
    assert painted.shape == (4, *SHAPE)
    assert (painted - TARGET).square().mean() < 0.01 < 0.1 < (control - TARGET).square().mean()


def test_a_sampler_that_does_not_fit_is_refused() -> None:
    model, backdoor = analytic("villan")
    with pytest.raises(InputError, match="sampler SCORE-SDE-VE with a model of family ddpm"):
        fire(model, backdoor, 1, sampler="SCORE-SDE-VE", steps=5, seed=0)
    with pytest.raises(InputError, match="sampler 'MAGIC'"):
        fire(model, backdoor, 1, sampler="MAGIC", steps=5, seed=0)
