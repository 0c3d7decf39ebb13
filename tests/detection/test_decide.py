"""From scores to a word: what is not known is never clean."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdefend_core.artifacts import Statistic, Word
from diffdefend_core.detection.decide import decide, probability, score

LIMIT = 4.0
NAMES = ("twin_response", "x0_response", "uniformity", "total_variation", "moderate_response", "violation")
SCORES = st.floats(-100, 100)


def statistics(
    twin: float, x0: float, uniformity: float, variation: float, moderate: float = -200.0, violation: float = -200.0
) -> dict[str, Statistic]:
    values = dict(zip(NAMES, (twin, x0, uniformity, variation, moderate, violation), strict=True))
    return {
        name: Statistic(value=z, center=0.0, spread=1.0, score=z, anomalous=z > LIMIT) for name, z in values.items()
    }


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((2.0, 4.0, 0.0, 0.0), 3.0),  # the responses are averaged
        ((0.0, 0.0, 9.0, 3.0), 6.0),  # uniformity as far as twice the variation supports it
        ((0.0, 0.0, 5.0, 50.0), 5.0),
        ((0.0, 0.0, 50.0, 0.0), 0.0),  # uniform images alone are no backdoor
        ((-3.0, -1.0, -4.0, 9.0), -2.0),
        ((10.0, 0.0, 9.0, 3.0), 9.0),  # or as far as twice the network's response does
        ((3.0, -9.0, 9.0, 0.0), 6.0),
        ((0.0, 0.0, 0.0, 0.0, 5.0, 1.0), 5.0),  # a deterministic attack may show at moderate noise alone
        ((0.0, 0.0, 0.0, 0.0, 1.0, 6.0), 6.0),
    ],
)
def test_the_score_by_hand(scores: tuple[float, ...], expected: float) -> None:
    assert score(statistics(*scores)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "covered", "word"),
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
def test_the_word_of_a_score(response: float, covered: bool, word: Word) -> None:
    assert decide(statistics(response, response, -9, 0), limit=LIMIT, covered=covered)[0] is word
    assert decide(statistics(-9, -9, response, 50), limit=LIMIT, covered=covered)[0] is word


@settings(max_examples=100, deadline=None)
@given(scores=st.tuples(SCORES, SCORES, SCORES, SCORES))
def test_an_uncovered_model_is_never_clean(scores: tuple[float, float, float, float]) -> None:
    word, _, reasons = decide(statistics(*scores), limit=LIMIT, covered=False)
    assert word is not Word.CLEAN
    assert "fewer than 8 clean models" in reasons[-1]


@settings(max_examples=100, deadline=None)
@given(scores=st.tuples(SCORES, SCORES, SCORES, SCORES), more=st.tuples(*[st.floats(0, 50)] * 4), covered=st.booleans())
def test_more_suspicious_is_never_cleaner(scores: tuple[float, ...], more: tuple[float, ...], covered: bool) -> None:
    order = [Word.CLEAN, Word.INCONCLUSIVE, Word.BACKDOORED]
    worse = [one + other for one, other in zip(scores, more, strict=True)]
    (word, chance, _), (worse_word, worse_chance, _) = (
        decide(statistics(*given), limit=LIMIT, covered=covered) for given in (scores, worse)
    )
    assert order.index(word) <= order.index(worse_word)
    assert chance <= worse_chance


@pytest.mark.parametrize("missing", NAMES)
@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize("others", [0.0, 50.0])
def test_a_missing_statistic_is_inconclusive(missing: str, covered: bool, others: float) -> None:
    measured = statistics(others, others, others, others)
    del measured[missing]
    word, chance, reasons = decide(measured, limit=LIMIT, covered=covered)
    assert (word, chance) == (Word.INCONCLUSIVE, 0.5)
    assert "could not be measured" in reasons[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", range(4))
def test_a_score_that_is_not_finite_is_inconclusive(index: int, bad: float) -> None:
    scores = [0.0] * 4
    assert decide(statistics(*scores), limit=LIMIT, covered=True)[0] is Word.CLEAN
    scores[index] = bad
    word, chance, _ = decide(statistics(*scores), limit=LIMIT, covered=True)
    assert (word, chance) == (Word.INCONCLUSIVE, 0.5)


def test_nothing_measured_is_inconclusive() -> None:
    assert decide({}, limit=LIMIT, covered=True)[0] is Word.INCONCLUSIVE


def test_the_reasons_name_what_is_anomalous() -> None:
    _, _, reasons = decide(statistics(9, 9, 0, 0), limit=LIMIT, covered=True)
    assert reasons[0].startswith("score 9.0 against a limit of 4")
    assert reasons[1] == "anomalous: twin_response, x0_response"
    assert decide(statistics(0, 0, 0, 0), limit=LIMIT, covered=True)[2][1] == "no statistic is anomalous"


def test_the_probability_is_logistic_about_the_limit() -> None:
    assert probability(LIMIT, LIMIT) == 0.5
    assert probability(LIMIT + 1, LIMIT) == pytest.approx(1 / (1 + math.exp(-2)))
    assert probability(math.nan, LIMIT) == 0.5
    assert 0 <= probability(-1e9, LIMIT) < 1e-10
    assert 1 - 1e-10 < probability(1e9, LIMIT) <= 1
