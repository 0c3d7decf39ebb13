"""Standardising against clean models: robust, floored, and never against the model itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdefend_core.detection.calibration import MINIMUM_MODELS, SPREAD_FLOOR, Calibration, CleanModel, standardise
from diffdefend_core.errors import ArtifactError

SHAPE = (1, 16, 16)


def clean_model(number: int, value: float, family: str = "ddpm", shape: tuple[int, ...] = SHAPE) -> CleanModel:
    return CleanModel(
        name=f"clean-{number}",
        digest=f"{number:064x}",
        family=family,
        shape=shape,
        statistics={"uniformity": float(value)},
    )


def calibration(*values: float) -> Calibration:
    models = tuple(clean_model(number, value) for number, value in enumerate(values))
    return Calibration(name="tests", options_digest="f" * 64, models=models)


def test_the_score_by_hand() -> None:
    # median 3, absolute deviations 2 1 0 1 97: their median is 1
    found = standardise(calibration(1, 2, 3, 4, 100), {"uniformity": 10.0}, limit=4.0)["uniformity"]
    assert (found.center, found.spread) == (3, pytest.approx(1.4826))
    assert found.score == pytest.approx(7 / 1.4826)
    assert found.anomalous


def test_a_spread_by_chance_too_small_is_floored() -> None:
    found = standardise(calibration(*[1.0] * 8), {"uniformity": 1.0 + 2 * SPREAD_FLOOR}, limit=4.0)["uniformity"]
    assert (found.spread, found.score, found.anomalous) == (SPREAD_FLOOR, pytest.approx(2), False)


@pytest.mark.parametrize(("value", "anomalous"), [(1.99, False), (2.01, True), (-50.0, False)])
def test_only_what_is_above_the_limit_is_anomalous(value: float, anomalous: bool) -> None:
    found = standardise(calibration(*[1.0] * 8), {"uniformity": value}, limit=4.0)
    assert found["uniformity"].anomalous is anomalous


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_gets_no_score(value: float) -> None:
    assert standardise(calibration(1, 2), {"uniformity": value}, limit=4.0) == {}


def test_without_a_clean_model_there_is_no_score() -> None:
    with pytest.raises(ValueError, match="no clean model"):
        standardise(calibration(), {"uniformity": 1.0}, limit=4.0)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=12), shift=st.floats(-3, 3), value=st.floats(-5, 5))
def test_the_score_does_not_depend_on_the_origin(values: list[float], shift: float, value: float) -> None:
    moved = standardise(calibration(*[item + shift for item in values]), {"uniformity": value + shift}, limit=4.0)
    still = standardise(calibration(*values), {"uniformity": value}, limit=4.0)
    assert moved["uniformity"].score == pytest.approx(still["uniformity"].score, abs=1e-6)


def test_no_model_vouches_for_itself() -> None:
    whole = calibration(*range(9))
    others = whole.without(whole.models[4].digest)
    assert [model.name for model in others.models] == [f"clean-{number}" for number in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert whole.without("e" * 64) == whole


def test_a_calibration_covers_the_family_and_shape_of_enough_models() -> None:
    assert calibration(*range(MINIMUM_MODELS)).covers("ddpm", SHAPE)
    assert not calibration(*range(MINIMUM_MODELS - 1)).covers("ddpm", SHAPE)
    assert not calibration(*range(MINIMUM_MODELS)).covers("ncsn", SHAPE)
    assert not calibration(*range(MINIMUM_MODELS)).covers("ddpm", (3, 16, 16))


def test_the_digest_names_the_content() -> None:
    whole = calibration(1, 2, 3)
    assert whole.digest() == Calibration.from_json(whole.to_json()).digest()
    assert len(whole.digest()) == 64
    others = [calibration(1, 2, 4), whole.without(whole.models[0].digest), dataclasses.replace(whole, name="other")]
    assert len({item.digest() for item in (whole, *others)}) == 4


def test_a_calibration_with_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ArtifactError):
        Calibration.from_json(calibration(1, math.inf).to_json())
