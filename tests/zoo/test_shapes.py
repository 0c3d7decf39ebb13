"""Generated pictures: their range, their background and that they differ."""

from __future__ import annotations

import itertools

import pytest
import torch

from zoo.shapes import target, trigger

TRIGGERS = ["box", "cross", "stripes", "checker", "diagonal"]
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
    with pytest.raises(KeyError, match="mickey"):
        draw("mickey")  # type: ignore[operator]


def test_a_picture_can_be_changed_without_changing_the_next() -> None:
    trigger("stripes").zero_()
    assert trigger("stripes").any()
