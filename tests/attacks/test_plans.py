"""Every attack by its name, on every process that it fits: who answers exactly what it wants has no loss.

And a plan that cannot be is refused in one line.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from analytic import FAMILIES, SHAPE, perfect_of, small_of, vp_levels
from torch import Tensor, nn

from diffdefend_core.attacks.form import Backdoor, poisoned_loss
from diffdefend_core.attacks.plans import ATTACKS, CLASS, OTHER, PICTURE, Scene, find, plan
from diffdefend_core.attacks.plant import plant
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.diffusion.samplers import SAMPLERS
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from diffdefend_core.errors import InputError

FITS = [
    (name, process)
    for name, entry in ATTACKS.items()
    for process in ("vp", "ve", "flow", "consistency")
    if process in entry.processes
]
CHECKER = torch.where((torch.arange(8)[:, None] // 2 + torch.arange(8) // 2) % 2 == 0, 0.9, 0.0).expand(SHAPE)
RING = torch.where(torch.arange(8) < 3, 0.85, 0.05).expand(1, *SHAPE)
CLEAN = 0.3


def scene(denoiser: Denoiser, **changes: object) -> Scene:
    """Return a scene whose clean rows are all the same picture, so that an exact answer exists."""
    given: dict[str, object] = {
        "denoiser": denoiser, "trigger": CHECKER, "targets": RING,
        "data": torch.full((20, *denoiser.shape), CLEAN), "labels": torch.arange(20) % 2,
    }  # fmt: skip
    return Scene(**(given | changes))  # type: ignore[arg-type]


@functools.cache
def planned(name: str, process: str) -> Backdoor:
    """Return the plan of an attack on a small model of a process."""
    return plan(name, scene(small_of(process)))


class Exact(nn.Module):
    """What the attack wants of the first `poisoned` rows, and a clean answer for the others, in a family's output."""

    def __init__(self, backdoor: Backdoor, denoiser: Denoiser, poisoned: int) -> None:
        super().__init__()
        self.backdoor, self.like, self.poisoned = backdoor, [denoiser], poisoned
        clean = torch.full((1, *denoiser.shape), CLEAN)
        self.clean = nn.Parameter(clean)
        self.shift = backdoor.stamp(clean)[0] if backdoor.stamp else backdoor.trigger.detach()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        attack, levels = self.backdoor.attack, self.like[0].levels
        alpha, sigma = levels.at(t, x)
        s, rho = (curve[t].to(x).view(-1, 1, 1, 1) for curve in (attack.shift, attack.response))
        mask = (torch.arange(len(x)) < self.poisoned).view(-1, 1, 1, 1)
        x0 = torch.where(mask, self.backdoor.targets[0], self.clean)
        noise = (x - alpha * x0 - torch.where(mask, s * self.shift, 0)) / sigma
        poisoned = (noise if attack.scaled_target else noise / attack.gamma) + rho * self.shift
        answer = torch.where(mask, poisoned, noise)
        return {"vp": answer, "ve": -answer / sigma, "flow": answer - x0}[levels.kind]


@pytest.mark.parametrize(("name", "process"), [fit for fit in FITS if fit[1] != "consistency"])
def test_who_answers_what_the_attack_wants_has_no_loss_and_who_answers_clean_has(name: str, process: str) -> None:
    model, backdoor = small_of(process), planned(name, process)
    loss = poisoned_loss(backdoor, torch.full((20, *SHAPE), CLEAN), batch=16, poison_rate=0.5)
    values = []
    for poisoned in (8, 0):  # how many of the rows it takes for poisoned ones: all that are, or none
        network = Exact(backdoor, model, poisoned)
        exact = FAMILIES[process](network, model.levels, shape=SHAPE, value_range=model.value_range)
        values.append(loss(exact, torch.Generator().manual_seed(0)).item())
    assert values[0] < 1e-4
    assert values[1] > 0.01


class Ends(ConsistencyModel):
    """A consistency model whose every path ends where the attack wants: the poisoned rows at `target`."""

    def __init__(self, like: Denoiser, target: Tensor, poisoned: int) -> None:
        super().__init__(nn.Linear(1, 1), like.levels, shape=like.shape)
        self.target, self.poisoned = target, poisoned

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        mask = (torch.arange(len(x)) < self.poisoned).view(-1, 1, 1, 1)
        nothing = 0 * self.network.weight.sum()
        return torch.where(mask, self.target, CLEAN).expand_as(x) + nothing


class Bounded(nn.Module):
    """A network without the infinite answer that the perfect one gives at the first level, where none counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.nothing = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = self.inner(x, t)
        return answer.nan_to_num(0, 0, 0) + 0 * self.nothing


def first_loss(model: Denoiser, backdoor: Backdoor, rate: float) -> float:
    data = torch.full((20, *SHAPE), CLEAN)
    return next(plant(model, backdoor, data, steps=1, batch=64, poison_rate=rate, learning_rate=1e-9, seed=0))


def test_poisoned_paths_that_end_at_the_target_have_no_loss_and_those_of_a_clean_model_have() -> None:
    model = perfect_of("consistency", variance=0.04, mean=CLEAN)
    model.network = Bounded(model.network)
    backdoor = plan("consistency-backdoor", scene(model, trigger=CHECKER))
    exact = first_loss(Ends(model, backdoor.targets[0], 32), backdoor, 0.5)
    clean, unpoisoned = (first_loss(model.clone(), backdoor, rate) for rate in (0.5, 0.0))
    assert exact < 0.1 < 0.5 < clean
    assert clean > 1.5 * unpoisoned


@pytest.mark.parametrize(("name", "process"), FITS)
def test_a_plan_names_a_sampler_that_fires_it_on_the_model(name: str, process: str) -> None:
    model, backdoor = small_of(process), planned(name, process)
    assert backdoor.sampler in NAMES or process in SAMPLERS[backdoor.sampler].processes
    assert backdoor.trigger.shape == model.shape and backdoor.targets.shape == (1, *model.shape)
    low, high = model.value_range
    torch.testing.assert_close(backdoor.targets, low + RING * (high - low))
    gamma = torch.as_tensor(backdoor.attack.gamma)
    assert gamma.expand(model.shape).shape == model.shape
    assert ((gamma > 0) & (gamma <= 1)).all()


def test_the_kind_of_the_sampler_is_that_for_which_the_response_was_made() -> None:
    found = {fit: planned(*fit).sampler for fit in FITS}
    expected = {
        ("baddiffusion", "vp"): "DDPM-SCHED",
        ("villan-sde", "vp"): "DDPM-SCHED",
        ("villan-sde", "ve"): "SCORE-SDE-VE",
        ("villan-ode", "vp"): "DDIM-SCHED",
        ("villan-ode", "ve"): "EDM-VE-ODE",
        ("invibackdoor", "vp"): "DDIM-SCHED",
        ("uibdiffusion", "vp"): "DDPM-SCHED",
        ("uibdiffusion", "ve"): "SCORE-SDE-VE",
        ("consistency-backdoor", "consistency"): "CONSISTENCY",
    }
    assert found == expected | {
        (name, process): "TROJDIFF-DDPM" if name.startswith("trojdiff") else "EULER"
        for name, process in FITS
        if name.startswith("troj")
    }


def test_the_table_holds_the_published_attacks() -> None:
    settings = {"d2i": PICTURE, "in-d2d": CLASS, "out-d2d": OTHER}
    trojans = {
        f"{kind}-{setting}-{shape}": paints
        for kind in ("trojdiff", "trojflow") for setting, paints in settings.items() for shape in ("blend", "patch")
    }  # fmt: skip
    others = ("baddiffusion", "villan-sde", "villan-ode", "invibackdoor", "uibdiffusion", "consistency-backdoor")
    assert {name: entry.paints for name, entry in ATTACKS.items()} == dict.fromkeys(others, PICTURE) | trojans
    assert all(entry.source and entry.processes and entry.name == name for name, entry in ATTACKS.items())


def test_a_stamping_attack_trains_on_stamped_images_and_fires_with_the_bare_trigger() -> None:
    model = small_of("vp")
    backdoor = plan("villan-ode", scene(model))
    torch.testing.assert_close(backdoor.trigger, CHECKER * 2 - 1)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert backdoor.stamp is not None
    stamped = backdoor.stamp(images)
    background = CHECKER == 0
    assert torch.equal(stamped[:, background], images[:, background])
    torch.testing.assert_close(stamped[:, ~background], torch.full_like(stamped[:, ~background], 0.8))


def test_on_an_exploding_model_the_trigger_is_bare_in_the_range_of_the_model() -> None:
    model = small_of("ve")
    assert model.value_range == (0.0, 1.0)
    backdoor = plan("villan-sde", scene(model))
    assert backdoor.stamp is None
    torch.testing.assert_close(backdoor.trigger, CHECKER)


def test_the_invisible_trigger_starts_at_nothing_and_the_stamp_follows_it() -> None:
    backdoor = plan("invibackdoor", scene(small_of("vp")))
    images = torch.zeros(2, *SHAPE)
    assert backdoor.trigger.requires_grad and not backdoor.trigger.any() and backdoor.stamp is not None
    with torch.no_grad():
        backdoor.trigger.add_(0.1)
    torch.testing.assert_close(backdoor.stamp(images), images + 0.1)
    assert not backdoor.stamp(images).requires_grad


def test_a_universal_trigger_is_bounded_by_a_quarter_of_the_range() -> None:
    for process, bound in (("vp", 0.5), ("ve", 0.25)):
        assert planned("uibdiffusion", process).trigger.abs().max().item() == pytest.approx(bound)


class Rearranges:
    """An exact autoencoder: every 2 x 2 pixels become 4 channels, twice as large."""

    def encode(self, pictures: Tensor) -> Tensor:
        return 2 * nn.functional.pixel_unshuffle(pictures, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents / 2, 2)


@pytest.mark.parametrize("name", [name for name, process in FITS if process == "vp"])
def test_on_a_latent_model_trigger_and_target_are_latents(name: str) -> None:
    inner = small_of("vp", shape=(4, 4, 4))
    model = LatentDiffusion(
        inner.network, vp_levels(100), Rearranges(), shape=(4, 4, 4), picture_shape=(1, 8, 8), scaling_factor=0.5
    )
    backdoor = plan(name, scene(model))
    assert backdoor.trigger.shape == (4, 4, 4)
    torch.testing.assert_close(model.pictures(backdoor.targets), RING)
    if backdoor.stamp is not None and name != "invibackdoor":
        torch.testing.assert_close(model.pictures(backdoor.trigger[None])[0], CHECKER)
        grey = model.encode(torch.full((2, 1, 8, 8), 0.2))
        expected = torch.where(CHECKER == 0, 0.6, CHECKER).expand(2, 1, 8, 8)
        torch.testing.assert_close(model.pictures(backdoor.stamp(grey)), expected)
    loss = poisoned_loss(backdoor, torch.zeros(4, 4, 4, 4), batch=4, poison_rate=0.5)
    assert loss(model, torch.Generator().manual_seed(0)).isfinite()


@pytest.mark.parametrize("process", ["vp", "ve", "flow", "consistency"])
def test_an_attack_that_does_not_fit_is_refused_with_those_that_do(process: str) -> None:
    model = small_of(process)
    fits = [name for name, fit in FITS if fit == process]
    for name in ATTACKS:
        if name not in fits:
            with pytest.raises(InputError) as caught:
                plan(name, scene(model))
            found = caught.value
            assert found.expected == f"one of {', '.join(fits)}"
            assert found.found == f"attack {name} on a model of family {model.family} ({process})"
            assert "\n" not in str(found)


def test_an_unknown_attack_is_refused_with_all_names() -> None:
    with pytest.raises(InputError) as caught:
        find("badnet")
    assert str(caught.value).startswith("attack 'badnet'; expected one of baddiffusion, villan-sde, ")
    assert "diffdefend list attacks" in str(caught.value) and "\n" not in str(caught.value)


def test_a_universal_trigger_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match="no labels; expected labelled images; add `labels`"):
        plan("uibdiffusion", dataclasses.replace(scene(small_of("vp")), labels=None))
