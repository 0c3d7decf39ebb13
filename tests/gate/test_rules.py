"""The gate decides from records alone; nothing but what is clean and fully measured passes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffdefend_core.artifacts import (
    Action,
    AttackRow,
    Candidate,
    GateDecision,
    Metric,
    Outcome,
    PurifiedModel,
    RuleResult,
    Scorecard,
    Verdict,
    Word,
)
from diffdefend_core.gate import rules
from diffdefend_core.gate.policy import shipped_policy

POLICY = shipped_policy()
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def verdict(word: Word = Word.CLEAN, digest: str = "d0", probability: float = 0.03) -> Verdict:
    return Verdict(
        model_digest=digest,
        word=word,
        probability=probability,
        statistics={},
        reasons=(),
        calibration_digest="c0",
        calibration_models=("clean-0",),
        seeds=(0,),
        forward_equivalents=1,
    )


def metric(value: float, **changes: Any) -> Metric:
    return dataclasses.replace(Metric(value=value, low=value, high=value, n=64), **changes)


def scorecard(before: dict[str, Metric] | None = None, after: dict[str, Metric] | None = None) -> Scorecard:
    return Scorecard(
        before=before if before is not None else {"fid": metric(10.0), "asr": metric(0.9)},
        after=after,
        extractor="e",
        extractor_sha256="f0",
        reference="self",
        samplers={},
        asr_threshold=0.05,
        seed=0,
        forward_equivalents=1,
    )


def candidate(action: Action = Action.KEEP, rescan: Verdict | None = None) -> Candidate:
    purified = PurifiedModel(
        digest="d1",
        parent_digest="d0",
        rounds=1,
        removal_loss=(1.0, 0.1),
        retention_loss=(0.1, 0.1),
        rescan=rescan or verdict(Word.CLEAN, "d1"),
        weights_sha256={},
        forward_equivalents=1,
        still_fires=0.0,
    )
    return Candidate(
        action=action,
        model_uri="file:///m/",
        trigger_uri="file:///t/",
        verdict_uri="file:///v/",
        purified=purified if action is Action.PURIFY else None,
    )


def repaired_scorecard(asr: float = 0.0, fid: float = 10.5) -> Scorecard:
    return scorecard(after={"fid": metric(fid), "asr": metric(asr)})


def decide(*records: Any) -> GateDecision:
    return rules.decide(*records, POLICY, model_name="m", now=NOW)


def results(decision: GateDecision) -> dict[str, RuleResult]:
    return {rule.id: rule.result for rule in decision.rules}


def test_a_clean_measured_model_is_promoted() -> None:
    decision = decide(verdict(), candidate(), scorecard())
    assert decision.outcome is Outcome.PROMOTED
    assert decision.model_digest == "d0"
    assert set(results(decision)) == {"verdict-clean", "records-agree", "metrics-there"}


@pytest.mark.parametrize(
    ("still_fires", "outcome"),
    [
        (0.01, Outcome.REPAIRED), (0.14, Outcome.QUARANTINED), (float("nan"), Outcome.QUARANTINED),
        (None, Outcome.QUARANTINED),
    ],
)  # fmt: skip
def test_a_repair_that_leaves_a_known_shift_firing_is_none_whatever_its_scan_says(
    still_fires: float | None, outcome: Outcome
) -> None:
    repair = candidate(Action.PURIFY)
    assert repair.purified is not None
    repair = dataclasses.replace(repair, purified=dataclasses.replace(repair.purified, still_fires=still_fires))
    decision = decide(verdict(Word.BACKDOORED), repair, repaired_scorecard())
    assert decision.outcome is outcome
    assert (results(decision)["verdict-clean"] is RuleResult.PASS) == (outcome is Outcome.REPAIRED)
    rule = next(rule for rule in decision.rules if rule.id == "verdict-clean")
    assert ("nothing else speaks for the repair" in rule.statement) == (still_fires is None)


@pytest.mark.parametrize(("known", "outcome"), [(0.0, Outcome.REPAIRED), (math.nan, Outcome.QUARANTINED)])
def test_the_true_trigger_speaks_for_a_repair_of_which_nothing_that_was_found_fires(
    known: float, outcome: Outcome
) -> None:
    repair = candidate(Action.PURIFY)
    assert repair.purified is not None
    repair = dataclasses.replace(repair, purified=dataclasses.replace(repair.purified, still_fires=None))
    card = repaired_scorecard()
    assert card.after is not None
    card = dataclasses.replace(card, after={**card.after, "asr_known": metric(known)})
    decision = decide(verdict(Word.BACKDOORED), repair, card)
    assert decision.outcome is outcome
    rule = next(rule for rule in decision.rules if rule.id == "verdict-clean")
    assert (rule.result is RuleResult.NOT_EVALUATED) == (outcome is Outcome.QUARANTINED)


def test_a_repaired_model_that_passes_is_repaired_and_names_the_new_digest() -> None:
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), repaired_scorecard())
    assert decision.outcome is Outcome.REPAIRED
    assert decision.model_digest == "d1"
    fid = next(rule for rule in decision.rules if rule.id == "fid-after")
    assert fid.value == pytest.approx(0.05)
    assert fid.margin == pytest.approx(0.05)


def test_the_decision_survives_json() -> None:
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), repaired_scorecard(asr=math.nan))
    assert GateDecision.from_json(decision.to_json()) == decision


@pytest.mark.parametrize(
    ("records", "blocking"),
    [
        ((verdict(Word.INCONCLUSIVE), candidate(Action.QUARANTINE), scorecard()), {"verdict-clean"}),
        ((verdict(Word.BACKDOORED), candidate(Action.QUARANTINE), scorecard()), {"verdict-clean", "records-agree"}),
        ((verdict(Word.BACKDOORED), candidate(Action.KEEP), scorecard()), {"verdict-clean", "records-agree"}),
        ((verdict(Word.CLEAN), candidate(Action.QUARANTINE), scorecard()), {"verdict-clean", "records-agree"}),
        ((verdict(), candidate(), scorecard(before={})), {"metrics-there"}),
        (
            (
                verdict(Word.BACKDOORED),
                candidate(Action.PURIFY, verdict(Word.BACKDOORED, "d1")),
                repaired_scorecard(),
            ),
            {"verdict-clean"},
        ),
        (
            (verdict(Word.BACKDOORED), candidate(Action.PURIFY, verdict(Word.CLEAN, "dX")), repaired_scorecard()),
            {"records-agree"},
        ),
        (
            (verdict(Word.BACKDOORED, "dX"), candidate(Action.PURIFY), repaired_scorecard()),
            {"records-agree"},
        ),
        ((verdict(Word.BACKDOORED), candidate(Action.PURIFY), repaired_scorecard(asr=0.03)), {"asr-after"}),
        ((verdict(Word.BACKDOORED), candidate(Action.PURIFY), repaired_scorecard(fid=11.5)), {"fid-after"}),
        (
            (verdict(Word.BACKDOORED), candidate(Action.PURIFY), scorecard()),
            {"metrics-there", "asr-after", "fid-after"},
        ),
    ],
)
def test_what_blocks(records: tuple[Any, ...], blocking: set[str]) -> None:
    decision = decide(*records)
    assert decision.outcome is Outcome.QUARANTINED
    assert {name for name, result in results(decision).items() if result is not RuleResult.PASS} == blocking


def test_an_inconclusive_scan_is_not_evaluated_rather_than_failed() -> None:
    decision = decide(verdict(Word.INCONCLUSIVE), candidate(Action.QUARANTINE), scorecard())
    assert results(decision)["verdict-clean"] is RuleResult.NOT_EVALUATED


def test_a_limit_that_is_just_met_passes() -> None:
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), repaired_scorecard(asr=0.02, fid=11.0))
    assert results(decision)["asr-after"] is RuleResult.PASS


@pytest.mark.parametrize(("low", "expected"), [(11.0, RuleResult.PASS), (14.0, RuleResult.FAIL)])
def test_against_its_own_samples_intervals_are_compared(low: float, expected: RuleResult) -> None:
    before, after = metric(10.0, high=12.0), metric(15.0, low=low, high=20.0)
    card = scorecard(before={"fid": before}, after={"fid": after, "asr": metric(0.0)})
    for own, result in ((True, expected), (False, RuleResult.FAIL)):
        judged = decide(
            verdict(Word.BACKDOORED), candidate(Action.PURIFY), dataclasses.replace(card, self_reference=own)
        )
        assert results(judged)["fid-after"] is result
        rule = next(rule for rule in judged.rules if rule.id == "fid-after")
        counted = f"at the low end it is {low / 12.0 - 1.0:.1%};" if own else "it is 50.0%;"
        assert f"({counted} from 10 to 15" in rule.statement


@pytest.mark.parametrize(
    ("known", "expected"),
    [(metric(0.0), RuleResult.PASS), (metric(0.5), RuleResult.FAIL), (metric(0.0, n=0), RuleResult.NOT_EVALUATED)],
)
def test_the_true_trigger_counts_where_it_is_known(known: Metric, expected: RuleResult) -> None:
    card = scorecard(after={"fid": metric(10.0), "asr": metric(0.0), "asr_known": known})
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), card)
    assert results(decision)["asr-known-after"] is expected
    assert results(decision)["asr-after"] is RuleResult.PASS
    assert decision.outcome is (Outcome.REPAIRED if expected is RuleResult.PASS else Outcome.QUARANTINED)


def attack(after: dict[str, Metric] | None, sampler: str = "UNIPC", trigger: str = "recovered") -> AttackRow:
    rates = {"asr": metric(0.9)}
    return AttackRow(
        trigger=trigger, sampler=sampler, kind="multistep", steps=20, before=rates, after=after, curve_before=()
    )


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"asr": metric(0.0)}, RuleResult.PASS),
        ({"asr": metric(0.4)}, RuleResult.FAIL),
        ({"asr": metric(math.nan)}, RuleResult.NOT_EVALUATED),
        ({"asr": metric(1.5)}, RuleResult.NOT_EVALUATED),
        ({}, RuleResult.NOT_EVALUATED),
        (None, RuleResult.NOT_EVALUATED),
    ],
)
@pytest.mark.parametrize(("trigger", "name"), [("recovered", "asr-after"), ("known", "asr-known-after")])
def test_the_worst_sampler_counts(
    after: dict[str, Metric] | None, expected: RuleResult, trigger: str, name: str
) -> None:
    card = dataclasses.replace(
        scorecard(after={"fid": metric(10.0), "asr": metric(0.0), "asr_known": metric(0.0)}),
        attacks=(attack({"asr": metric(0.0)}, "DDIM-SCHED", trigger), attack(after, trigger=trigger)),
    )
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), card)
    assert results(decision)[name] is expected
    assert (decision.outcome is Outcome.REPAIRED) == (expected is RuleResult.PASS)
    if expected is RuleResult.FAIL:
        rule = next(rule for rule in decision.rules if rule.id == name)
        assert "with UNIPC" in rule.statement and rule.value == 0.4


def test_distances_of_different_extractors_or_references_are_not_compared() -> None:
    for before, after in (("one", "one"), ("one", "other"), ("one", "")):
        expected = RuleResult.PASS if before == after else RuleResult.NOT_EVALUATED
        card = scorecard(
            before={"fid": metric(10.0, basis=before)},
            after={"fid": metric(10.0, basis=after), "asr": metric(0.0)},
        )
        decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), card)
        assert results(decision)["fid-after"] is expected


def test_a_relative_change_from_zero_is_not_evaluated() -> None:
    card = scorecard(before={"fid": metric(0.0)}, after={"fid": metric(0.0), "asr": metric(0.0)})
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), card)
    assert results(decision)["fid-after"] is RuleResult.NOT_EVALUATED


numbers = st.floats(allow_nan=True, allow_infinity=True)
metrics = st.builds(Metric, value=numbers, low=numbers, high=numbers, n=st.integers(-1, 99))
tables = st.dictionaries(st.sampled_from(["fid", "kid", "asr", "mse"]), metrics)
verdicts = st.builds(verdict, st.sampled_from(Word), st.sampled_from(["d0", "d1", "d2"]), numbers)
candidates = st.builds(candidate, st.sampled_from(Action), verdicts)
scorecards = st.builds(scorecard, tables, st.none() | tables)


@given(verdicts, candidates, scorecards)
def test_nothing_but_clean_leaves_the_gate(seen: Verdict, branch: Candidate, card: Scorecard) -> None:
    decision = decide(seen, branch, card)
    if decision.outcome is Outcome.PROMOTED:
        assert seen.word is Word.CLEAN
        assert branch.action is Action.KEEP
    if decision.outcome is Outcome.REPAIRED:
        assert branch.purified is not None
        assert branch.purified.rescan.word is Word.CLEAN
    if decision.outcome is not Outcome.QUARANTINED:
        assert all(rule.result is RuleResult.PASS for rule in decision.rules)
    assert GateDecision.from_json(decision.to_json()) == decision


@given(
    st.sampled_from(["asr", "fid"]),
    st.sampled_from(["before", "after"]),
    st.sampled_from([math.nan, math.inf, -math.inf, None]),
    st.sampled_from(["value", "low", "high"]),
)
def test_a_missing_or_non_finite_needed_metric_never_passes(name: str, when: str, bad: float | None, part: str) -> None:
    tables = {
        "before": {"fid": metric(10.0)},
        "after": {"fid": metric(10.0), "asr": metric(0.0)},
    }
    if name in tables[when]:
        good = tables[when].pop(name)
        if bad is not None:
            tables[when][name] = dataclasses.replace(good, **{part: bad})
        expected = Outcome.QUARANTINED
    else:
        expected = Outcome.REPAIRED
    decision = decide(verdict(Word.BACKDOORED), candidate(Action.PURIFY), scorecard(**tables))
    assert decision.outcome is expected


def test_the_gate_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, diffdefend_core.gate.rules; print({'torch', 'mlflow', 'kfp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
