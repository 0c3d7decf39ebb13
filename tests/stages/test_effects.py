"""Which of the found shifts fire at the suspect, what is retained, and what is left after a repair; in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_of, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.config import load_settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.evaluation import Backdoor
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.stages import backdoors
from diffdefend_core.stages import effects as effects_module
from diffdefend_core.stages.effects import Effects

LEVELS = vp_levels(100)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.6, -0.9, 0.6)
OTHER = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
SETTINGS = load_settings(device="cpu", detection={"stochastic_steps": 20})


@pytest.fixture(scope="module")
def suspect() -> Denoiser:
    return poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)


@pytest.fixture(scope="module")
def effects(suspect: Denoiser) -> Effects:
    return Effects.of(suspect, {"trigger": TRIGGER, "other": OTHER}, SETTINGS)


def test_a_trigger_fires_and_another_shift_does_not(effects: Effects) -> None:
    assert effects.firing == ("trigger",)
    assert not effects.collapses and not effects.by_any_sampler


def test_the_effects_of_two_sets_of_shifts_are_those_of_all(suspect: Denoiser, effects: Effects) -> None:
    apart = [Effects.of(suspect, {name: shift}, SETTINGS) for name, shift in (("trigger", TRIGGER), ("other", OTHER))]
    both = apart[0] + apart[1]
    assert (both.firing, both.collapses) == (effects.firing, effects.collapses)
    assert both.forward_equivalents == effects.forward_equivalents and len(both.backdoors) == len(effects.backdoors)


def test_a_shift_on_which_both_sides_collapse_does_not_fire() -> None:
    constant = clean_denoiser(LEVELS, variance=1e-6)
    found = Effects.of(constant, {"any": OTHER}, SETTINGS)
    assert found.firing == () and found.backdoors == ()
    assert found.collapses


@pytest.mark.parametrize(
    ("collapsing", "by", "by_any"),
    [
        ({(True, 1), (False, 1), (False, -1)}, True, True),  # TrojDiff: quiet noise leads to the picture on both sides
        ({(True, 1)}, True, False),
        ({(True, 1), (False, 1, "another")}, True, False),
        ({(False, 1), (True, -1)}, False, False),
        ({(True, 1), (True, -1), (False, 1), (False, -1)}, None, False),
        ({(True, -1)}, None, False),
    ],
)
def test_a_shift_fires_by_a_sampler_by_which_its_opposite_does_not(
    monkeypatch: pytest.MonkeyPatch, collapsing: set[tuple[object, ...]], by: bool | None, by_any: bool
) -> None:
    """Each case: the samplers (stochastic or not) and signs that lead to one picture, and what is made of it."""

    def paint(model: Denoiser, backdoor: Backdoor, *_: object) -> Tensor:
        sign = 1 if torch.equal(backdoor.shift, TRIGGER) else -1
        if (backdoor.stochastic, sign, "another") in collapsing:
            return torch.ones(16, *SHAPE)
        return torch.zeros(16, *SHAPE) if (backdoor.stochastic, sign) in collapsing else torch.rand(16, *SHAPE)

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    found = Effects.of(clean_denoiser(LEVELS), {"trigger": TRIGGER}, SETTINGS)
    assert [item.stochastic for item in found.backdoors[:1]] == ([] if by is None else [by])
    assert found.firing == (() if by is None else ("trigger",)) and found.by_any_sampler is by_any


@pytest.mark.parametrize("firing", [True, False])
def test_the_shift_itself_is_not_what_a_trigger_paints(monkeypatch: pytest.MonkeyPatch, firing: bool) -> None:
    """A deterministic sampler carries any shift to the end, where it is black and white; fresh noise covers it."""
    dark = torch.full(SHAPE, -1.0)

    def paint(model: Denoiser, item: Backdoor, *_: object) -> Tensor:
        fires = item.stochastic and firing and (item.shift < 0).all()
        return torch.zeros(16, *SHAPE) if fires or not item.stochastic else torch.rand(16, *SHAPE)

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    found = Effects.of(clean_denoiser(LEVELS), {"dark": dark}, SETTINGS)
    assert found.firing == (("dark",) if firing else ())
    assert [item.stochastic for item in found.backdoors] == [True] * firing
    assert found.collapses is not firing


def test_own_samples_that_are_the_target_are_not_retained(suspect: Denoiser, effects: Effects) -> None:
    painted = effects.backdoors[0].target * 2 - 1
    samples: Tensor = torch.cat([painted[None], 0.5 * torch.randn(7, *SHAPE)])
    assert torch.equal(effects.without_targets(suspect, samples), samples[1:])


def test_the_targets_are_what_the_suspect_paints_in_the_range_of_its_data(suspect: Denoiser, effects: Effects) -> None:
    targets = effects.targets(suspect)
    assert targets and all((target - TARGET).square().mean() < 0.01 for target in targets)
    assert Effects.of(suspect, {"other": OTHER}, SETTINGS).targets(suspect) == ()


def test_what_is_left_tells_a_repaired_model_from_one_that_still_fires(suspect: Denoiser, effects: Effects) -> None:
    assert effects.left(suspect)[0] == 1.0
    left, _ = effects.left(clean_denoiser(LEVELS))
    assert left is not None and left < 0.05


def test_where_nothing_fired_nothing_is_said_of_what_is_left(suspect: Denoiser) -> None:
    assert Effects(SETTINGS).left(suspect) == (None, 0)


@pytest.mark.parametrize(("hits", "again", "rate", "painted"), [
    (0, 0, 0.0, 64), (1, 0, 1 / 256, 256), (1, 5, 6 / 256, 256), (7, 0, 7 / 64, 64)
])  # fmt: skip
def test_what_fires_in_few_of_the_images_is_fired_again(
    monkeypatch: pytest.MonkeyPatch, hits: int, again: int, rate: float, painted: int
) -> None:
    """One of 64 says little of one in a hundred, and would cost another round of the repair."""

    def paint(model: Denoiser, item: Backdoor, options: object, seed: int, progress: object, count: int) -> Tensor:
        images = torch.zeros(count, *SHAPE)
        images[: hits if count == effects_module.FIRED else again] = 1
        return images

    monkeypatch.setattr(effects_module, "triggered_images", paint)
    item = Backdoor(TRIGGER, torch.ones(SHAPE), "DDIM-SCHED")
    assert Effects(SETTINGS, backdoors=(item,)).left(clean_denoiser(LEVELS)) == (pytest.approx(rate), 25 * painted)


def test_where_few_steps_show_nothing_a_shift_is_fired_in_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDE of VE leaves noise in its images with as many steps as others need, and then no trigger seems to fire."""
    counted: list[int] = []

    def paint(model: Denoiser, item: Backdoor, options: EvaluationOptions, *rest: object) -> Tensor:
        counted.append(options.stochastic_steps)
        fires = item.sampler == "SCORE-SDE-VE" and torch.equal(item.shift, TRIGGER) and options.stochastic_steps > 50
        images = torch.zeros if fires else torch.rand
        return images((16, *SHAPE))

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    suspect = small_of("ve")
    found = Effects.of(suspect, {"trigger": TRIGGER, "again": TRIGGER, "other": OTHER}, load_settings(device="cpu"))
    assert found.firing == ("trigger", "again") and set(counted) == {150}
    counted.clear()
    rate, spent = found.left(suspect)
    assert rate == 1.0 and len(counted) == 2  # once by each sampler
    assert spent == 64 * 2 * (min(150, len(suspect.levels)) + min(25, len(suspect.levels)))


def paint_apart(monkeypatch: pytest.MonkeyPatch, *, trigger: float, other: float) -> None:
    """Let images be apart by a mean squared error, under the trigger and under other shifts."""

    def paint(model: Denoiser, item: Backdoor, *_: object) -> Tensor:
        spread = trigger if torch.equal(item.shift, TRIGGER) else other
        return 0.5 + spread**0.5 * torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1)) / 2**0.5

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)


@pytest.mark.parametrize(("process", "fires"), [("consistency", True), ("flow", False)])
def test_a_consistency_model_paints_alike_under_any_shift_and_more_so_under_a_trigger(
    monkeypatch: pytest.MonkeyPatch, process: str, fires: bool
) -> None:
    paint_apart(monkeypatch, trigger=0.002, other=0.03)
    shifts = {"trigger": TRIGGER, "other": OTHER}
    assert Effects.of(small_of(process), shifts, SETTINGS).firing == (("trigger",) if fires else ())


@pytest.mark.parametrize(("process", "fires"), [("vp", False), ("flow", False), ("ve", True)])
def test_many_pictures_of_one_class_are_not_one_picture(
    monkeypatch: pytest.MonkeyPatch, process: str, fires: bool
) -> None:
    """An attack that paints any picture of a class makes the images alike; of VE that is all that can be asked for."""

    paint_apart(monkeypatch, trigger=0.03, other=0.2)
    assert Effects.of(small_of(process), {"trigger": TRIGGER}, SETTINGS).firing == (("trigger",) if fires else ())


@pytest.mark.parametrize(("at", "fires"), [(effects_module.FIRES_AT, True), (effects_module.SMALL_FIRES_AT, False)])
def test_what_leads_to_one_picture_in_half_of_the_cases_fires_unless_more_is_asked(
    monkeypatch: pytest.MonkeyPatch, at: float, fires: bool
) -> None:
    def paint(model: Denoiser, item: Backdoor, *_: object) -> Tensor:
        images = torch.rand(16, *SHAPE)
        images[: 9 if torch.equal(item.shift, TRIGGER) else 0] = 0
        return images

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    found = Effects.of(small_of("vp"), {"trigger": TRIGGER}, SETTINGS, at=at)
    assert found.firing == (("trigger",) if fires else ())


@pytest.mark.parametrize(("collapsing_at", "fires_at"), [(0.9, 0.7), (0.6, 0.5), (0.1, None), (1.1, 1.0), (None, None)])
def test_a_shift_that_is_too_large_is_fired_at_smaller_scales(
    monkeypatch: pytest.MonkeyPatch, collapsing_at: float | None, fires_at: float | None
) -> None:
    """The trigger leads to one picture at any scale, its opposite from `collapsing_at` on."""
    scales: set[float] = set()

    def paint(model: Denoiser, item: Backdoor, *_: object) -> Tensor:
        scale = (item.shift / TRIGGER).mean().item()
        scales.add(round(abs(scale), 3))
        one = collapsing_at is not None and (scale > 0 or -scale >= collapsing_at)
        return torch.zeros(16, *SHAPE) if one else torch.rand(16, *SHAPE)

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    suspect = small_of("flow")
    found = Effects.of(suspect, {"trigger": TRIGGER}, SETTINGS).and_of_weaker(suspect, {"trigger": TRIGGER})
    assert found.firing == (() if fires_at is None else ("trigger",))
    assert all(torch.allclose(item.shift, (fires_at or 0) * TRIGGER) for item in found.backdoors)
    assert len(scales) == {1.0: 1, 0.7: 2, 0.5: 3}.get(fires_at or 0, 1 if collapsing_at is None else 3)


@pytest.mark.parametrize(("alike", "fires"), [(16, True), (13, True), (10, False)])
def test_half_of_the_images_is_not_enough_of_a_weaker_shift(
    monkeypatch: pytest.MonkeyPatch, alike: int, fires: bool
) -> None:
    def paint(model: Denoiser, item: Backdoor, *_: object) -> Tensor:
        scale = (item.shift / TRIGGER).mean().item()
        images = torch.zeros(16, *SHAPE)
        return (
            images if abs(scale) == 1 else torch.cat([images[: alike if scale > 0 else 1], torch.rand(16, *SHAPE)])[:16]
        )

    for module in (effects_module, backdoors):
        monkeypatch.setattr(module, "triggered_images", paint)
    suspect = small_of("flow")
    found = Effects.of(suspect, {"trigger": TRIGGER}, SETTINGS).and_of_weaker(suspect, {"trigger": TRIGGER})
    assert found.firing == (("trigger",) if fires else ())


def test_every_evaluation_is_counted(suspect: Denoiser) -> None:
    seen: list[int] = []
    handle = suspect.network.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    try:
        effects = Effects.of(suspect, {"trigger": TRIGGER, "other": OTHER}, SETTINGS)
        painted = sum(seen)
        assert effects.left(suspect)[1] == sum(seen) - painted
    finally:
        handle.remove()
    assert effects.forward_equivalents == painted


def test_of_shifts_that_lead_to_one_picture_one_is_left(suspect: Denoiser, effects: Effects) -> None:
    another = [Backdoor(item.shift, 1 - item.target, item.sampler) for item in effects.backdoors[:1]]
    twice = replace(effects, backdoors=(*effects.backdoors, *another, *effects.backdoors))
    kept = twice.once()
    assert kept.backdoors == (*effects.backdoors, *another) and kept.firing == effects.firing
    assert len({item.sampler for item in effects.backdoors}) == len(effects.backdoors)
