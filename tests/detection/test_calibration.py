"""Standardising against clean models: robust, floored, and never against the model itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdefend_core.detection.calibration import (
    FEW_FLOOR,
    MINIMUM_MODELS,
    MINIMUM_RELATED,
    RELATED_FLOOR,
    SPREAD_FLOOR,
    Calibration,
    CleanModel,
    standardise,
)
from diffdefend_core.errors import ArtifactError

SHAPE = (1, 16, 16)


def clean_model(number: int, value: float) -> CleanModel:
    return CleanModel(
        name=f"clean-{number}",
        digest=f"{number:064x}",
        family="ddpm",
        process="vp",
        shape=SHAPE,
        statistics={"uniformity": float(value)},
    )


def calibration(*values: float) -> Calibration:
    return Calibration(name="tests", options_digest="f" * 64, models=clean_models(*values))


def clean_models(*values: float) -> tuple[CleanModel, ...]:
    return tuple(clean_model(number, value) for number, value in enumerate(values))


def test_the_score_by_hand() -> None:
    # median 3, absolute deviations 2 1 0 1 97: their median is 1
    found = standardise(clean_models(1, 2, 3, 4, 100), {"uniformity": 10.0}, limit=4.0)["uniformity"]
    assert (found.center, found.spread) == (3, pytest.approx(1.4826))
    assert found.score == pytest.approx(7 / 1.4826)
    assert found.anomalous


def test_a_spread_by_chance_too_small_is_floored() -> None:
    found = standardise(clean_models(*[1.0] * 8), {"uniformity": 1.0 + 2 * SPREAD_FLOOR}, limit=4.0)["uniformity"]
    assert (found.spread, found.score, found.anomalous) == (SPREAD_FLOOR, pytest.approx(2), False)


def test_a_wider_floor_gives_a_milder_score() -> None:
    models, raw = clean_models(*[1.0] * 8), {"uniformity": 3.0}
    scores = [standardise(models, raw, 4.0, floor)["uniformity"].score for floor in (SPREAD_FLOOR, RELATED_FLOOR)]
    assert scores == pytest.approx([2 / SPREAD_FLOOR, 2 / RELATED_FLOOR])
    wide = clean_models(-4, -2, 0, 2, 4)
    spreads = [standardise(wide, raw, 4.0, floor)["uniformity"].spread for floor in (SPREAD_FLOOR, RELATED_FLOOR)]
    assert spreads[0] == spreads[1] > RELATED_FLOOR


@pytest.mark.parametrize(("value", "anomalous"), [(1.99, False), (2.01, True), (-50.0, False)])
def test_only_what_is_above_the_limit_is_anomalous(value: float, anomalous: bool) -> None:
    found = standardise(clean_models(*[1.0] * 8), {"uniformity": value}, limit=4.0)
    assert found["uniformity"].anomalous is anomalous


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_gets_no_score(value: float) -> None:
    assert standardise(clean_models(1, 2), {"uniformity": value}, limit=4.0) == {}


def test_without_a_clean_model_there_is_no_score() -> None:
    with pytest.raises(ValueError, match="no clean model"):
        standardise(clean_models(), {"uniformity": 1.0}, limit=4.0)


@pytest.mark.parametrize("held", [{}, {"uniformity": math.nan}, {"uniformity": math.inf}, {"other": 1.0}])
def test_clean_models_that_lack_a_statistic_are_refused_by_name(held: dict[str, float]) -> None:
    lacking = dataclasses.replace(clean_model(9, 0), statistics=held)
    with pytest.raises(ValueError, match="no uniformity of clean-9; expected"):
        standardise((*clean_models(1, 2), lacking), {"uniformity": 1.0}, limit=4.0)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=12), shift=st.floats(-3, 3), value=st.floats(-5, 5))
def test_the_score_does_not_depend_on_the_origin(values: list[float], shift: float, value: float) -> None:
    moved = standardise(clean_models(*[item + shift for item in values]), {"uniformity": value + shift}, limit=4.0)
    still = standardise(clean_models(*values), {"uniformity": value}, limit=4.0)
    assert moved["uniformity"].score == pytest.approx(still["uniformity"].score, abs=1e-6)


def test_no_model_vouches_for_itself() -> None:
    whole = calibration(*range(9))
    others = whole.without(whole.models[4].digest)
    assert [model.name for model in others.models] == [f"clean-{number}" for number in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert whole.without("e" * 64) == whole


@pytest.mark.parametrize(
    ("count", "floor"),
    [
        (MINIMUM_MODELS, SPREAD_FLOOR),
        (MINIMUM_MODELS - 1, FEW_FLOOR),
        (MINIMUM_RELATED, FEW_FLOOR),
    ],
)
def test_models_of_its_kind_speak_of_a_model_with_a_wider_floor_the_fewer_they_are(count: int, floor: float) -> None:
    whole = calibration(*range(count))
    assert whole.kin("ddpm", SHAPE, "vp") == (whole.models, floor)


@pytest.mark.parametrize(("family", "shape"), [("ddpm", (3, 32, 32)), ("ours", SHAPE), ("ours", (3, 32, 32))])
def test_without_its_kind_those_of_its_process_speak_of_a_model(family: str, shape: tuple[int, ...]) -> None:
    whole = calibration(*range(9))
    assert whole.kin(family, shape, "vp") == (whole.models, RELATED_FLOOR)
    alone = dataclasses.replace(clean_model(9, 0), family="ours", shape=(3, 32, 32))
    mixed = dataclasses.replace(whole, models=(*whole.models, alone))
    assert mixed.kin("ours", (3, 32, 32), "vp") == (mixed.models, RELATED_FLOOR)  # one is no crowd


def test_a_model_of_another_process_has_nobody_to_speak_of_it() -> None:
    for process in ("ve", "latent vp"):
        assert calibration(*range(9)).kin("ncsn", SHAPE, process) == ((), math.inf)
    few = calibration(*range(MINIMUM_RELATED - 1))
    assert few.kin("ddpm", SHAPE, "vp") == few.kin("ddpm", (3, 8, 8), "vp") == ((), math.inf)
    assert calibration().kin("ddpm", SHAPE, "vp") == ((), math.inf)


def test_the_fewer_speak_of_a_model_the_wider_the_floor() -> None:
    assert SPREAD_FLOOR < FEW_FLOOR < RELATED_FLOOR


def test_the_digest_names_the_content() -> None:
    whole = calibration(1, 2, 3)
    assert whole.digest() == Calibration.from_json(whole.to_json()).digest()
    assert len(whole.digest()) == 64
    others = [calibration(1, 2, 4), whole.without(whole.models[0].digest), dataclasses.replace(whole, name="other")]
    assert len({item.digest() for item in (whole, *others)}) == 4


def test_a_calibration_with_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ArtifactError):
        Calibration.from_json(calibration(1, math.inf).to_json())
