"""One rule of a policy, asked of the records of one model: it passes, fails, or could not be evaluated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime

from diffdefend_core.artifacts import Action, Candidate, Metric, Rule, RuleResult, Scorecard, Verdict
from diffdefend_core.gate.policy import SHARES, Policy, PolicyRule, Waiver, timestamp

# success rates, and the trigger of the rows of the scorecard that count for each
TRIGGERS = {"asr": "recovered", "asr_known": "known"}
# how a statement begins by the bound that counts: the value itself, or an end of its interval
COUNTED = {"value": "it is", "low": "at the low end it is", "high": "at the high end it is"}


def judge(rule: PolicyRule, judged: Verdict, scorecard: Scorecard) -> Rule:
    """Return what the rule says; `judged` is the verdict on the model that leaves the gate.

    A value that is missing, not finite, of too few samples, or a share outside of [0, 1] is not evaluated, and that
    blocks even where the rule only warns: a warning is about a limit, not about a value that nobody knows.
    """
    after = measured(rule.metric, judged, scorecard, rule.min_n)
    if not rule.is_change:
        evidence = _interval(after) + _whose(after, rule, scorecard)
        return _compared(rule, _end(after, rule, scorecard), evidence, _bound(rule, scorecard))
    before = measured(rule.metric.replace("after", "before", 1), judged, scorecard, rule.min_n)
    change = _change(before, after, rule, scorecard)
    return _compared(rule, change, _both(before, after), _bound(rule, scorecard))


def asked(rule: PolicyRule, candidate: Candidate, scorecard: Scorecard) -> bool:
    """Whether the rule is asked: `trigger_known` is after a repair of which the true trigger was measured too."""
    if rule.when == "always":
        return True
    repaired = candidate.action is Action.PURIFY
    known = any(name.endswith("_known") for name in {**scorecard.before, **(scorecard.after or {})})
    return repaired and (known or rule.when == "repaired")


def waive(rule: Rule, policy: Policy, model_digest: str, now: datetime) -> tuple[Rule, Waiver | None]:
    """Return the rule with the waiver applied that holds for this model, and that waiver.

    Only a rule that failed can be waived. An expired waiver is named in the statement and changes nothing.
    """
    if rule.result is not RuleResult.FAIL or not rule.blocking:
        return rule, None
    fitting = [item for item in policy.waivers if item.rule == rule.id and item.model_digest == model_digest]
    valid = next((item for item in fitting if item.holds(now)), None)
    if valid is not None:
        remark = f"waived by {valid.owner} until {timestamp(valid.expires)}: {valid.statement}"
        return dataclasses.replace(rule, waived=True, statement=f"{rule.statement}; {remark}"), valid
    if fitting:
        remark = f"the waiver of {fitting[0].owner} expired on {timestamp(fitting[0].expires)}"
        return dataclasses.replace(rule, statement=f"{rule.statement}; {remark}"), None
    return rule, None


def measured(path: str, judged: Verdict, scorecard: Scorecard, min_n: int = 1) -> Metric | None:
    """Return the value at the dotted path, None unless it is there, finite, in range and of `min_n` samples.

    A value of the verdict has no interval: both its ends are the value.
    """
    where, _, rest = path.partition(".")
    if where == "verdict":
        value = _of_verdict(rest, judged)
        metric = None if value is None else Metric(value=value, low=value, high=value, n=min_n)
        name = rest
    else:
        side, _, name = rest.partition(".")
        metric = _worst(side, name, scorecard) if name in TRIGGERS else _table(side, scorecard).get(name)
    if metric is None or metric.n < min_n:
        return None
    if name in SHARES and not 0.0 <= metric.value <= 1.0:
        return None
    return metric if all(math.isfinite(number) for number in (metric.value, metric.low, metric.high)) else None


def _table(side: str, scorecard: Scorecard) -> Mapping[str, Metric]:
    return (scorecard.before if side == "before" else scorecard.after) or {}


def _worst(side: str, name: str, scorecard: Scorecard) -> Metric | None:
    """Return the largest attack success rate of all samplers, None if one is missing or is no rate."""
    rows = [row for row in scorecard.attacks if row.trigger == TRIGGERS[name]]
    rates = [((row.before if side == "before" else row.after) or {}).get("asr") for row in rows]
    rates.append(_table(side, scorecard).get(name))
    there = [rate for rate in rates if rate is not None and rate.n >= 1 and 0.0 <= rate.value <= 1.0]
    return max(there, key=lambda rate: rate.value) if len(there) == len(rates) else None


def _whose(metric: Metric | None, rule: PolicyRule, scorecard: Scorecard) -> str:
    """Return with which sampler a success rate was reached, if a row of the scorecard says so."""
    trigger = TRIGGERS.get(rule.metric.rpartition(".")[2])
    rows = [row for row in scorecard.attacks if row.trigger == trigger]
    found = [row.sampler for row in rows if metric in ((row.before or {}).get("asr"), (row.after or {}).get("asr"))]
    return f", with {found[0]}" if metric is not None and found else ""


def _of_verdict(path: str, verdict: Verdict) -> float | None:
    if path == "probability":
        return verdict.probability
    _, name, part = path.split(".")
    statistic = verdict.statistics.get(name)
    if statistic is None:
        return None
    return statistic.value if part == "value" else statistic.score


def _bound(rule: PolicyRule, scorecard: Scorecard) -> str:
    bound = rule.self_reference_bound if scorecard.self_reference and rule.self_reference_bound else rule.bound
    if bound != "worst":
        return bound
    return "high" if rule.direction == "at_most" else "low"


def _end(metric: Metric | None, rule: PolicyRule, scorecard: Scorecard) -> float | None:
    return None if metric is None else float(getattr(metric, _bound(rule, scorecard)))


def _change(before: Metric | None, after: Metric | None, rule: PolicyRule, scorecard: Scorecard) -> float | None:
    """Return the change from before to after; its low end is that from the high end before to the low end after.

    A relative change from a value that is not positive is undefined, and so is any between values of different bases
    (extractor, reference): None.
    """
    if before is None or after is None or before.basis != after.basis:
        return None
    ends = {"value": ("value", "value"), "low": ("low", "high"), "high": ("high", "low")}
    new_end, old_end = ends[_bound(rule, scorecard)]
    new, old = float(getattr(after, new_end)), float(getattr(before, old_end))
    if rule.max_absolute_change is not None:
        return new - old
    return new / old - 1.0 if before.value > 0.0 and old > 0.0 else None


def _compared(rule: PolicyRule, value: float | None, evidence: str, bound: str) -> Rule:
    blocking = rule.severity == "block"
    limit = -rule.limit if rule.is_change and rule.direction == "at_least" else rule.limit
    if value is None or not math.isfinite(value):
        statement = f"{in_words(rule)} (not measured: {evidence})"
        return Rule(id=rule.id, statement=statement, result=RuleResult.NOT_EVALUATED, limit=limit, blocking=blocking)
    margin = limit - value if rule.direction == "at_most" else value - limit
    return Rule(
        id=rule.id,
        statement=f"{in_words(rule)} ({COUNTED[bound]} {_number(value, rule)}; {evidence})",
        result=RuleResult.PASS if margin >= 0.0 else RuleResult.FAIL,
        value=value,
        limit=limit,
        margin=margin,
        blocking=blocking,
    )


def in_words(rule: PolicyRule) -> str:
    """Return what the rule asks as a sentence without its full stop."""
    name = rule.metric.removeprefix("scorecard.")
    limit = _number(rule.limit, rule)
    if not rule.is_change:
        return f"{name} is {rule.direction.replace('_', ' ')} {limit}"
    verb = "rises" if rule.direction == "at_most" else "falls"
    return f"{name} {verb} by at most {limit} against the original"


def _number(value: float, rule: PolicyRule) -> str:
    share = rule.metric.rpartition(".")[2] in SHARES or rule.max_relative_change is not None
    return f"{value:.1%}" if share else f"{value:.4g}"


def _interval(metric: Metric | None) -> str:
    if metric is None:
        return "missing, not finite, out of range or too few samples"
    if metric.low == metric.high == metric.value:
        return f"n = {metric.n}"
    return f"interval {metric.low:.3g} to {metric.high:.3g}, n = {metric.n}"


def _both(before: Metric | None, after: Metric | None) -> str:
    if before is None or after is None:
        absent = [side for side, metric in (("before", before), ("after", after)) if metric is None]
        return f"{' and '.join(absent)} missing, not finite, out of range or too few samples"
    if before.basis != after.basis:
        return f"measured with {before.basis or 'unknown'} before and {after.basis or 'unknown'} after: no comparison"
    return f"from {before.value:.3g} to {after.value:.3g}, {_interval(after)}"
