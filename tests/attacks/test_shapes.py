"""Generated pictures: their range, their background and that they differ."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffdefend_core.attacks.shapes import frames, target, trigger
from diffdefend_core.errors import InputError

TRIGGERS = ["box", "cross", "stripes", "checker", "diagonal", "noise"]
TARGETS = ["ring", "triangle", "square", "hat", "plus"]


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_lies_in_the_range_of_the_model(name: str, size: int) -> None:
    drawn = trigger(name, size)
    assert drawn.shape == (1, size, size) and drawn.dtype == torch.float32
    assert drawn.min() >= -1 and drawn.max() <= 1 and drawn.std() > 0.1


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_a_bright_shape_on_a_dark_ground(name: str, size: int) -> None:
    drawn = target(name, size)
    assert drawn.shape == (1, size, size)
    assert drawn.unique().tolist() == pytest.approx([-0.9, 0.7])
    assert 0.05 < (drawn > 0).float().mean() < 0.6


@pytest.mark.parametrize(("name", "lies"), [("box", True), ("cross", True), ("stripes", False), ("diagonal", False)])
def test_only_some_triggers_lie_on_a_background_that_stamping_keeps(name: str, lies: bool) -> None:
    assert ((trigger(name) == -1).float().mean() > 0.3).item() is lies


def test_all_pictures_differ() -> None:
    for draw, names in ((trigger, TRIGGERS), (target, TARGETS)):
        for one, other in itertools.combinations(names, 2):
            assert (draw(one) - draw(other)).square().mean() > 0.05


@pytest.mark.parametrize("draw", [trigger, target])
def test_an_unknown_picture_is_refused(draw: object) -> None:
    with pytest.raises(InputError, match=r"mickey.*expected one of .*(box|ring)"):
        draw("mickey")  # type: ignore[operator]


def test_a_picture_can_be_changed_without_changing_the_next() -> None:
    trigger("stripes").zero_()
    assert trigger("stripes").any()


@pytest.mark.parametrize("size", [8, 16, 32])
def test_frames_are_another_distribution_of_bright_outlines(size: int) -> None:
    drawn = frames(200, size)
    assert drawn.shape == (200, 1, size, size) and drawn.dtype == torch.float32
    assert drawn.unique().tolist() == pytest.approx([-0.9, 0.7])
    share = (drawn > 0).float().mean((1, 2, 3))
    assert share.min() > 0.02 and share.max() < 0.7
    assert len(drawn.flatten(1).unique(dim=0)) > 10
    assert not (drawn[:, :, 0] > 0).any()  # a frame never touches the upper edge


def test_frames_are_hollow_and_reproducible_by_their_seed() -> None:
    drawn = frames(50, 32)
    bright = drawn[:, 0] > 0
    inside = bright.cumsum(1).bool() & bright.flip(1).cumsum(1).flip(1).bool()
    assert (inside & ~bright).flatten(1).any(1).all()
    assert torch.equal(drawn, frames(50, 32)) and not torch.equal(drawn, frames(50, 32, seed=1))
