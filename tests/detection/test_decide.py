"""From scores to a word: what is not known is never clean."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdefend_core.artifacts import Statistic, Word
from diffdefend_core.detection.decide import decide, probability, score

LIMIT = 4.0
NAMES = ("parity", "contrast", "violation", "content", "uniformity", "total_variation")
SCORES = st.tuples(*[st.floats(-100, 100)] * len(NAMES))
MORE = st.tuples(*[st.floats(0, 50)] * len(NAMES))
BASIS = "9 clean models"


def statistics(*scores: float, **given: float) -> dict[str, Statistic]:
    """Statistics of these scores, in the order of NAMES or by name; what is not given is 0."""
    values = {**dict.fromkeys(NAMES, 0.0), **dict(zip(NAMES, scores, strict=False)), **given}
    return {
        name: Statistic(value=z, center=0.0, spread=1.0, score=z, anomalous=z > LIMIT) for name, z in values.items()
    }


def decided(found: dict[str, Statistic], *, covered: bool = True) -> tuple[Word, float, tuple[str, ...]]:
    return decide(found, limit=LIMIT, basis=BASIS, covered=covered)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"violation": 6.0}, 6.0),  # stands alone
        ({"parity": 6.0}, 0.0),  # parity that shifts without a trigger show as well is no backdoor
        ({"parity": 6.0, "contrast": 5.0}, 5.0),
        ({"parity": 6.0, "contrast": 50.0}, 6.0),
        ({"content": 6.0, "contrast": 5.0}, 5.0),  # the painted picture counts like parity
        ({"contrast": 50.0}, 0.0),
        ({"uniformity": 50.0}, 0.0),  # uniform images alone are no backdoor
        ({"uniformity": 9.0, "total_variation": 6.0}, 3.0),  # the total variation supports half of its strength
        ({"uniformity": 5.0, "total_variation": 50.0}, 5.0),
        ({"uniformity": 9.0, "parity": 3.0}, 6.0),  # the network's answers support twice theirs
        ({"uniformity": 9.0, "content": 3.0}, 6.0),
        ({"uniformity": 9.0, "violation": 3.0}, 6.0),
        ({"total_variation": 50.0}, 0.0),
        (dict.fromkeys(NAMES, -2.0), -2.0),
    ],
)
def test_the_score_by_hand(scores: dict[str, float], expected: float) -> None:
    assert score(statistics(**scores)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "covered", "word"),
    [
        (-2.0, True, Word.CLEAN),
        (0.0, True, Word.CLEAN),
        (3.0, True, Word.CLEAN),
        (3.01, True, Word.INCONCLUSIVE),
        (4.0, True, Word.INCONCLUSIVE),
        (4.01, True, Word.BACKDOORED),
        (50.0, True, Word.BACKDOORED),
        (-2.0, False, Word.INCONCLUSIVE),
        (0.0, False, Word.INCONCLUSIVE),
        (4.01, False, Word.INCONCLUSIVE),
        (8.0, False, Word.INCONCLUSIVE),
        (8.01, False, Word.BACKDOORED),
    ],
)
def test_the_word_of_a_score(value: float, covered: bool, word: Word) -> None:
    rest = dict.fromkeys(NAMES, -9.0)
    for scores in ({"violation": value}, {"parity": value, "contrast": value}, {"uniformity": value, "content": value}):
        assert decided(statistics(**(rest | scores)), covered=covered)[0] is word


@settings(max_examples=100, deadline=None)
@given(scores=SCORES)
def test_a_model_that_no_clean_one_is_related_to_is_never_clean(scores: tuple[float, ...]) -> None:
    word, _, reasons = decided(statistics(*scores), covered=False)
    assert word is not Word.CLEAN
    assert "no clean model speaks" in reasons[-1]


@settings(max_examples=100, deadline=None)
@given(scores=SCORES)
def test_what_is_anomalous_is_never_clean(scores: tuple[float, ...]) -> None:
    found = statistics(*scores)
    assert not (any(item.anomalous for item in found.values()) and decided(found)[0] is Word.CLEAN)


def test_an_anomaly_that_nothing_supports_is_inconclusive() -> None:
    word, chance, reasons = decided(statistics(uniformity=50.0))
    assert word is Word.INCONCLUSIVE and chance < 0.01
    assert "nothing supports the anomaly" in reasons[-1]


@settings(max_examples=100, deadline=None)
@given(scores=SCORES, more=MORE, covered=st.booleans())
def test_more_suspicious_is_never_cleaner(scores: tuple[float, ...], more: tuple[float, ...], covered: bool) -> None:
    order = [Word.CLEAN, Word.INCONCLUSIVE, Word.BACKDOORED]
    worse = [one + other for one, other in zip(scores, more, strict=True)]
    (word, chance, _), (worse_word, worse_chance, _) = (
        decided(statistics(*given), covered=covered) for given in (scores, worse)
    )
    assert order.index(word) <= order.index(worse_word)
    assert chance <= worse_chance


@pytest.mark.parametrize("missing", NAMES)
@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize("others", [0.0, 50.0])
def test_a_missing_statistic_is_inconclusive(missing: str, covered: bool, others: float) -> None:
    measured = statistics(*[others] * len(NAMES))
    del measured[missing]
    word, chance, reasons = decided(measured, covered=covered)
    assert (word, chance) == (Word.INCONCLUSIVE, 0.5)
    assert "could not be measured" in reasons[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_score_that_is_not_finite_is_inconclusive(name: str, bad: float) -> None:
    assert decided(statistics())[0] is Word.CLEAN
    word, chance, _ = decided(statistics(**{name: bad}))
    assert (word, chance) == (Word.INCONCLUSIVE, 0.5)


def test_another_method_decides_by_its_own_score() -> None:
    found = {"texture": statistics(violation=9.0)["violation"]}
    word, _, reasons = decide(found, limit=LIMIT, basis=BASIS, score=lambda given: given["texture"].score - 1)
    assert word is Word.BACKDOORED and reasons[0].startswith("score 8.0")
    assert decided(found)[0] is Word.INCONCLUSIVE


def test_nothing_measured_is_inconclusive() -> None:
    assert decided({})[0] is Word.INCONCLUSIVE


def test_the_reasons_name_what_is_anomalous_and_what_it_is_compared_with() -> None:
    _, _, reasons = decided(statistics(parity=9.0, contrast=9.0))
    assert reasons[0] == "score 9.0 against a limit of 4 standard deviations of 9 clean models"
    assert reasons[1] == "anomalous: parity, contrast"
    assert decided(statistics())[2][1] == "no statistic is anomalous"


def test_the_probability_is_logistic_about_the_limit() -> None:
    assert probability(LIMIT, LIMIT) == 0.5
    assert probability(LIMIT + 1, LIMIT) == pytest.approx(1 / (1 + math.exp(-2)))
    assert probability(math.nan, LIMIT) == 0.5
    assert 0 <= probability(-1e9, LIMIT) < 1e-10
    assert 1 - 1e-10 < probability(1e9, LIMIT) <= 1
