"""A policy is read strictly, all its mistakes at once; its rules compare what they say they compare."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffdefend_core.artifacts import (
    Action,
    Candidate,
    Metric,
    Outcome,
    PurifiedModel,
    RuleResult,
    Scorecard,
    Statistic,
    Verdict,
    Word,
)
from diffdefend_core.gate import judge, rules
from diffdefend_core.gate.policy import Mistakes, Policy, build_policy, parse_policy, shipped_policy

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DIGEST = "a" * 64


def rule(**changes: Any) -> dict[str, Any]:
    given = {"id": "r", "metric": "scorecard.before.fid", "direction": "at_most", "threshold": 7.0}
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def change(**changes: Any) -> dict[str, Any]:
    return rule(**{"metric": "scorecard.after.fid", "when": "repaired", "threshold": None, **changes})


def waiver(**changes: Any) -> dict[str, Any]:
    given = {"rule": "r", "model_digest": DIGEST, "statement": "Known and accepted for the pilot.",
             "owner": "ann@example.org", "expires": "2026-06-30"}  # fmt: skip
    return {**given, **changes}


def policy(*given: dict[str, Any], waivers: list[dict[str, Any]] | None = None) -> Policy:
    return build_policy({"version": 1, "rules": list(given), "waivers": waivers or []})


def mistakes(text: str) -> tuple[str, ...]:
    with pytest.raises(Mistakes) as caught:
        parse_policy(text)
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


def verdict(probability: float = 0.02) -> Verdict:
    parity = Statistic(value=0.1, center=0.0, spread=0.1, score=1.0, anomalous=False)
    return Verdict(
        model_digest=DIGEST, word=Word.CLEAN, probability=probability, statistics={"parity": parity}, reasons=(),
        calibration_digest="c", calibration_models=("c0",), seeds=(0,), forward_equivalents=1,
    )  # fmt: skip


def metric(value: float, low: float | None = None, high: float | None = None, n: int = 64) -> Metric:
    return Metric(value=value, low=value if low is None else low, high=value if high is None else high, n=n)


def scorecard(
    before: dict[str, Metric] | None = None, after: dict[str, Metric] | None = None, own: bool = False
) -> Scorecard:
    return Scorecard(
        before=before or {"fid": metric(6.0, 5.0, 8.0)}, after=after, extractor="e", extractor_sha256="f",
        reference="r", self_reference=own, samplers={}, asr_threshold=0.05, seed=0, forward_equivalents=1,
    )  # fmt: skip


def candidate(action: Action = Action.KEEP) -> Candidate:
    repaired = PurifiedModel(
        digest="e" * 64, parent_digest=DIGEST, rounds=1, removal_loss=(1.0,), retention_loss=(1.0,),
        rescan=dataclasses.replace(verdict(), model_digest="e" * 64), weights_sha256={}, forward_equivalents=1,
    )  # fmt: skip
    return Candidate(
        action=action, model_uri="m", trigger_uri="t", verdict_uri="v",
        purified=repaired if action is Action.PURIFY else None,
    )  # fmt: skip


def result(given: dict[str, Any], card: Scorecard) -> RuleResult:
    return judge.judge(policy(given).rules[0], verdict(), card).result


def test_the_shipped_policy_asks_for_what_a_repair_must_not_cost() -> None:
    shipped = shipped_policy()
    assert {item.id: item.limit for item in shipped.rules} == {
        "asr-after": 0.02, "asr-known-after": 0.02, "fid-after": 0.1,
    }  # fmt: skip
    assert shipped.waivers == ()
    assert build_policy(shipped.content()) == shipped


def test_all_mistakes_come_at_once_each_with_its_path() -> None:
    wrong = {
        "version": 2,
        "rules": [
            rule(threshold="0.02"),
            rule(id="Bad Name", direction="below"),
            rule(id="two", threshold=None),
            rule(id="three", max_relative_change=0.1),
            rule(id="verdict-clean"),
            rule(id="four", metric="before.fid", treshold=3),
            rule(id="five", threshold=math.nan, min_n=0),
        ],
        "waivers": [waiver(model_digest="abc", expires="soon", owner="")],
        "notes": "x",
    }
    lines = mistakes(yaml.safe_dump(wrong))
    for path in (
        "version", "rules[0].threshold", "rules[1].id", "rules[1].direction", "rules[2]", "rules[3]", "rules[4].id",
        "rules[5].metric", "rules[5].treshold is no field", "rules[6].threshold", "rules[6].min_n",
        "waivers[0].model_digest", "waivers[0].expires", "waivers[0].owner", "notes is no field",
    ):  # fmt: skip
        assert any(line.startswith(path) for line in lines), (path, lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("version: 1", "rules is missing"),
        ("version: [1", "no YAML"),
        ("version: 1\nrules: []\nrules: []", "rules is given twice"),
        ("version: 1\nrules: &a []\nwaivers: *a", "aliases"),
        ("version: !!python/object:os.system 1\nrules: []", "no YAML"),
        ("version: 1\nrules: []\nwaivers: [{}]", "waivers[0].owner is missing"),
        ("version: true\nrules: []", "version"),
        ("x" * 300_000, "300000 bytes"),
    ],
)
def test_a_file_that_is_no_policy_is_told_so(text: str, said: str) -> None:
    assert any(said in line for line in mistakes(text))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (rule(metric="scorecard.after.fid"), "after a repair only"),
        (change(metric="scorecard.before.fid", max_relative_change=0.1), "needs a metric of scorecard.after"),
        (rule(metric="verdict.probability", bound="worst"), "no interval"),
        (change(max_relative_change=-0.1), "greater than or equal to 0"),
    ],
)
def test_parts_that_do_not_fit_together_are_a_mistake(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Mistakes, match=said):
        policy(given)


def test_names_agree_across_the_policy() -> None:
    with pytest.raises(Mistakes, match=r"two rules have the id 'r'.*'verdict-clean', which is no rule"):
        policy(rule(), rule(), waivers=[waiver(rule="verdict-clean")])


@pytest.mark.parametrize(
    ("bound", "direction", "expected"),
    [
        ("value", "at_most", RuleResult.PASS),
        ("low", "at_most", RuleResult.PASS),
        ("high", "at_most", RuleResult.FAIL),
        ("worst", "at_most", RuleResult.FAIL),
        ("value", "at_least", RuleResult.FAIL),
        ("high", "at_least", RuleResult.PASS),
        ("worst", "at_least", RuleResult.FAIL),
    ],
)
def test_the_bound_of_the_interval_that_is_named_counts(bound: str, direction: str, expected: RuleResult) -> None:
    """The FID is 6, its interval 5 to 8, the threshold 7."""
    assert result(rule(bound=bound, direction=direction), scorecard()) is expected


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (change(max_relative_change=0.1), 0.5),
        (change(max_relative_change=0.1, bound="low"), 8.0 / 11.0 - 1.0),
        (change(max_relative_change=0.1, bound="worst"), 10.0 / 8.0 - 1.0 + 0.25),
        (change(max_absolute_change=1.0), 3.0),
        (change(max_absolute_change=1.0, direction="at_least", bound="worst"), -3.0),
    ],
)
def test_a_change_is_measured_against_the_original(given: dict[str, Any], value: float) -> None:
    """Before: 6, from 5 to 8 or 11; after: 9, from 8 to 10 or 7.5."""
    before = metric(6.0, 20.0 / 3.0, 11.0)
    card = scorecard({"fid": before}, {"fid": metric(9.0, 8.0, 10.0)})
    found = judge.judge(policy(given).rules[0], verdict(), card)
    assert found.value == pytest.approx(value)
    assert found.result is (RuleResult.PASS if value == 8.0 / 11.0 - 1.0 else RuleResult.FAIL)


def test_a_fall_is_limited_by_at_least() -> None:
    given = change(max_relative_change=0.1, direction="at_least")
    cards = [scorecard({"fid": metric(10.0)}, {"fid": metric(after)}) for after in (9.5, 8.0, 20.0)]
    assert [result(given, card) for card in cards] == [RuleResult.PASS, RuleResult.FAIL, RuleResult.PASS]


def test_against_its_own_samples_the_other_bound_counts() -> None:
    given = change(max_relative_change=0.1, self_reference_bound="low")
    tables = {"fid": metric(6.0, 5.0, 8.0)}, {"fid": metric(9.0, 8.0, 10.0)}
    assert result(given, scorecard(*tables, own=True)) is RuleResult.PASS
    assert result(given, scorecard(*tables, own=False)) is RuleResult.FAIL


@pytest.mark.parametrize(
    "bad", [None, metric(math.nan), metric(6.0, high=math.inf), metric(6.0, low=-math.inf), metric(6.0, n=31)]
)
@pytest.mark.parametrize("severity", ["block", "warn"])
def test_what_was_not_measured_blocks_even_where_the_rule_only_warns(bad: Metric | None, severity: str) -> None:
    given = policy(rule(metric="scorecard.before.kid", min_n=32, severity=severity))
    tables = {"fid": metric(6.0)} if bad is None else {"fid": metric(6.0), "kid": bad}
    made = rules.decide(verdict(), candidate(), scorecard(tables), given, model_name="m", now=NOW)
    assert made.rules[-1].result is RuleResult.NOT_EVALUATED
    assert made.outcome is Outcome.QUARANTINED


def test_a_warning_does_not_block() -> None:
    outcomes = [
        rules.decide(
            verdict(), candidate(), scorecard(), policy(rule(threshold=1.0, severity=severity)), model_name="m", now=NOW
        ).outcome
        for severity in ("block", "warn")
    ]
    assert outcomes == [Outcome.QUARANTINED, Outcome.PROMOTED]


def test_values_of_the_verdict_can_be_asked_for() -> None:
    given = policy(
        rule(id="p", metric="verdict.probability", threshold=0.1),
        rule(id="s", metric="verdict.statistics.parity.score", threshold=0.5),
        rule(id="x", metric="verdict.statistics.absent.value", threshold=0.5),
    )
    found = [judge.judge(item, verdict(), scorecard()).result for item in given.rules]
    assert found == [RuleResult.PASS, RuleResult.FAIL, RuleResult.NOT_EVALUATED]
    assert judge.judge(given.rules[0], verdict(math.nan), scorecard()).result is RuleResult.NOT_EVALUATED


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, Outcome.PROMOTED),
        ({"expires": "2026-06-01"}, Outcome.PROMOTED),
        ({"expires": "2026-05-31"}, Outcome.QUARANTINED),
        ({"expires": "2026-06-01T12:00:00Z"}, Outcome.QUARANTINED),
        ({"model_digest": "b" * 64}, Outcome.QUARANTINED),
        ({"rule": "other"}, Outcome.QUARANTINED),
    ],
)
def test_a_waiver_waives_one_rule_of_one_model_until_its_date(changes: dict[str, str], outcome: Outcome) -> None:
    given = policy(rule(threshold=1.0), rule(id="other"), waivers=[waiver(**changes)])
    made = rules.decide(verdict(), candidate(), scorecard(), given, model_name="m", now=NOW)
    assert made.outcome is outcome
    assert [item.owner for item in made.waivers] == (["ann@example.org"] if outcome is Outcome.PROMOTED else [])
    assert made.rules[3].waived is (outcome is Outcome.PROMOTED)


def test_a_waiver_does_not_stand_in_for_a_measurement() -> None:
    given = policy(rule(metric="scorecard.before.kid"), waivers=[waiver()])
    made = rules.decide(verdict(), candidate(), scorecard(), given, model_name="m", now=NOW)
    assert made.outcome is Outcome.QUARANTINED and made.waivers == ()


def test_a_waiver_needs_a_time_with_its_zone() -> None:
    with pytest.raises(Mistakes, match=r"waivers\[0\]\.expires"):
        policy(rule(), waivers=[waiver(expires="2026-06-01T12:00:00")])


LENIENT = [
    rule(id=f"r{index}", metric=name, threshold=threshold, severity=severity)
    for index, (name, threshold, severity) in enumerate(
        itertools.product(["scorecard.before.fid", "verdict.probability"], [-1.0, 1e9], ["block", "warn"])
    )
]


@given(st.sets(st.integers(0, len(LENIENT) - 1)), st.sampled_from(Word), st.sampled_from(Action))
def test_no_policy_switches_the_fixed_rules_off(chosen: set[int], word: Word, action: Action) -> None:
    seen = dataclasses.replace(verdict(), word=word)
    given_policy = policy(*(LENIENT[index] for index in sorted(chosen)))
    made = rules.decide(seen, candidate(action), scorecard(), given_policy, model_name="m", now=NOW)
    assert [item.id for item in made.rules[:3]] == ["verdict-clean", "records-agree", "metrics-there"]
    if made.outcome is Outcome.PROMOTED:
        assert word is Word.CLEAN and action is Action.KEEP


def test_the_digest_is_that_of_the_rules_and_does_not_follow_the_waivers() -> None:
    digest = policy(rule()).digest()
    assert policy(rule(), waivers=[waiver()]).digest() == digest
    assert policy(rule(severity="block")).digest() == digest
    for changes in ({"threshold": 7.5}, {"severity": "warn"}, {"min_n": 2}, {"bound": "low"}, {"id": "q"}):
        assert policy(rule(**changes)).digest() != digest
    first, second = (policy(rule(), waivers=[waiver(expires=day)]).waivers[0] for day in ("2026-06-30", "2026-07-01"))
    assert first.digest() != second.digest()


def test_a_policy_travels_as_json_and_keeps_its_digest() -> None:
    given = policy(rule(), change(id="c", max_absolute_change=0.5), waivers=[waiver()])
    assert build_policy(json.loads(json.dumps(given.content()))) == given
