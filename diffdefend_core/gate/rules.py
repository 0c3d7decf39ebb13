"""The gate's rules and the decision: pure functions over the records of one model, no IO and no torch.

A rule passes, fails or could not be evaluated; only the first does not block. A model is promoted when it is clean and
every rule passes, it is repaired when it was backdoored and its repaired version passes every rule; all else is
quarantined. Rules that speak about a repair are asked only when there was one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from diffdefend_core.artifacts import (
    Action,
    Candidate,
    GateDecision,
    Metric,
    Outcome,
    Rule,
    RuleResult,
    Scorecard,
    Verdict,
    Word,
)
from diffdefend_core.errors import InputError
from diffdefend_core.options import GateOptions
from diffdefend_core.provenance import digest_of

RuleFunction = Callable[[Verdict, Candidate, Scorecard, GateOptions], Rule]

ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")


def verdict_is_clean(verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions) -> Rule:
    """The model that would leave the gate is clean: by its scan, or after a repair by the scan of the repaired one."""
    judged, whose = _judged_verdict(verdict, candidate)
    statement = f"the scan of the {whose} says clean (it says {judged.word}, probability {judged.probability:.3g})"
    if judged.word is Word.INCONCLUSIVE or not 0.0 <= judged.probability <= 1.0:
        return Rule(id="verdict-clean", statement=statement, result=RuleResult.NOT_EVALUATED)
    passes = judged.word is Word.CLEAN and _branch_fits(verdict, candidate)
    return Rule(id="verdict-clean", statement=statement, result=_result(passes))


def records_agree(verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions) -> Rule:
    """The branch fits the verdict; a repair starts at the scanned model and ends at one that passed the same scan."""
    purified = candidate.purified
    passes = _branch_fits(verdict, candidate)
    if purified is not None:
        passes = (
            passes
            and purified.parent_digest == verdict.model_digest
            and purified.rescan.model_digest == purified.digest
            and purified.rescan.calibration_digest == verdict.calibration_digest
            and purified.digest != purified.parent_digest
        )
    statement = f"the records speak of one model: verdict {verdict.word}, branch {candidate.action}"
    return Rule(id="records-agree", statement=statement, result=_result(passes))


def metrics_are_there(verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions) -> Rule:
    """Every metric that the gate needs was measured and is finite; a missing one is not evaluated and blocks."""
    needed = [("fid", "before")]
    if candidate.action is Action.PURIFY:
        needed += [("fid", "after"), ("asr", "after")]
    missing = [f"{name} {when}" for name, when in needed if _measured(scorecard, when, name) is None]
    names = ", ".join(f"{name} {when}" for name, when in needed)
    statement = f"measured and finite: {names}" + (f" (missing: {', '.join(missing)})" if missing else "")
    result = RuleResult.NOT_EVALUATED if missing else RuleResult.PASS
    return Rule(id="metrics-there", statement=statement, result=result)


def asr_after_repair(verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions) -> Rule:
    """The attack success rate after the repair is at most `asr_after_max` (a share); the interval is reported.

    Every sampler that the trigger was fired with counts, and so does the true trigger of a red-team model where it is
    known: the largest rate decides.
    """
    limit = options.asr_after_max
    worst = _worst_success(scorecard)
    if worst is None:
        return _unmeasured("asr-after", "the attack success rate after repair was not measured", limit)
    asr, where = worst
    statement = (
        f"the attack success rate after repair is at most {limit:.1%} "
        f"(at worst it is {asr.value:.1%}{where}, interval {asr.low:.1%} to {asr.high:.1%}, n = {asr.n})"
    )
    return _at_most("asr-after", statement, asr.value, limit)


def fid_after_repair(verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions) -> Rule:
    """The FID after the repair is at most (1 + `fid_increase_max`) times that before; undefined if that was zero.

    Values that were measured with different extractors or references are not compared.

    Against a reference set the values count. Against the model's own samples the FID before is sampling noise alone, so
    there the low end of the interval after counts against the high end of the interval before.
    """
    limit = options.fid_increase_max
    before, after = _measured(scorecard, "before", "fid"), _measured(scorecard, "after", "fid")
    if before is not None and after is not None and before.basis != after.basis:
        statement = (
            f"the FID before ({before.basis or 'unknown'}) and after ({after.basis or 'unknown'}) do not compare"
        )
        return _unmeasured("fid-after", statement, limit)
    if before is None or after is None or before.value <= 0.0:
        return _unmeasured("fid-after", "the FID before and after repair cannot be compared", limit)
    new, old = (after.low, before.high) if scorecard.self_reference else (after.value, before.value)
    change = new / old - 1.0
    judged = ", low end against high end: the reference is the model itself" if scorecard.self_reference else ""
    statement = (
        f"the FID rises by at most {limit:.1%} through the repair "
        f"(it changes by {change:+.1%}{judged}: {before.value:.3g} to {after.value:.3g}, "
        f"interval {after.low:.3g} to {after.high:.3g}, n = {after.n})"
    )
    return _at_most("fid-after", statement, change, limit)


RULES: tuple[RuleFunction, ...] = (verdict_is_clean, records_agree, metrics_are_there)
REPAIR_RULES: tuple[RuleFunction, ...] = (asr_after_repair, fid_after_repair)


def policy_digest(options: GateOptions) -> str:
    """Return the digest of the policy (sha256, hex). Raises InputError if the policy is not a usable one."""
    _check(options)
    return digest_of(dataclasses.asdict(options))


def decide(
    verdict: Verdict, candidate: Candidate, scorecard: Scorecard, options: GateOptions, *, model_name: str
) -> GateDecision:
    """Return the gate's decision, without what only the registry knows (versions, aliases, run).

    `model_digest` of the decision is that of the model that would leave the gate: the repaired one if there is one.
    Raises InputError if the policy is not a usable one.
    """
    asked = RULES + (REPAIR_RULES if candidate.action is Action.PURIFY else ())
    digest = policy_digest(options)
    rules = tuple(rule(verdict, candidate, scorecard, options) for rule in asked)
    purified = candidate.purified
    return GateDecision(
        outcome=_outcome(verdict, candidate, rules),
        model_name=model_name,
        model_digest=purified.digest if purified is not None else verdict.model_digest,
        policy_digest=digest,
        rules=rules,
    )


def _outcome(verdict: Verdict, candidate: Candidate, rules: tuple[Rule, ...]) -> Outcome:
    if not rules or any(rule.result is not RuleResult.PASS for rule in rules):
        return Outcome.QUARANTINED
    if verdict.word is Word.CLEAN and candidate.action is Action.KEEP:
        return Outcome.PROMOTED
    if verdict.word is Word.BACKDOORED and candidate.action is Action.PURIFY:
        return Outcome.REPAIRED
    return Outcome.QUARANTINED


def _judged_verdict(verdict: Verdict, candidate: Candidate) -> tuple[Verdict, str]:
    if candidate.action is Action.PURIFY and candidate.purified is not None:
        return candidate.purified.rescan, "repaired model"
    return verdict, "model"


def _branch_fits(verdict: Verdict, candidate: Candidate) -> bool:
    fits = {Word.CLEAN: Action.KEEP, Word.BACKDOORED: Action.PURIFY, Word.INCONCLUSIVE: Action.QUARANTINE}
    has_repair = candidate.purified is not None
    return candidate.action is fits[verdict.word] and has_repair == (candidate.action is Action.PURIFY)


def _measured(scorecard: Scorecard, when: str, name: str) -> Metric | None:
    """Return the metric if it is there, of at least one sample, and every number of it is finite."""
    metrics: Mapping[str, Metric] = (scorecard.before if when == "before" else scorecard.after) or {}
    metric = metrics.get(name)
    return metric if metric is not None and _is_usable(metric) else None


def _is_usable(metric: Metric) -> bool:
    return metric.n >= 1 and all(math.isfinite(number) for number in (metric.value, metric.low, metric.high))


def _worst_success(scorecard: Scorecard) -> tuple[Metric, str] | None:
    """Return the largest of the success rates after the repair and whose it is, None if one of them is not usable."""
    after = scorecard.after or {}
    asked = [
        ((row.after or {}).get("asr"), f" with {row.sampler} under the {row.trigger} trigger")
        for row in scorecard.attacks
    ]
    asked += [(after.get(name), "") for name in ("asr", "asr_known") if name == "asr" or name in after]
    rates = [(rate, whose) for rate, whose in asked if rate is not None and _is_usable(rate) and 0 <= rate.value <= 1]
    return max(rates, key=lambda item: item[0].value) if len(rates) == len(asked) else None


def _at_most(name: str, statement: str, value: float, limit: float) -> Rule:
    if not math.isfinite(value):
        return _unmeasured(name, statement, limit)
    passes = value <= limit
    return Rule(id=name, statement=statement, result=_result(passes), value=value, limit=limit, margin=limit - value)


def _unmeasured(name: str, statement: str, limit: float) -> Rule:
    return Rule(id=name, statement=statement, result=RuleResult.NOT_EVALUATED, limit=limit)


def _result(passes: bool) -> RuleResult:
    return RuleResult.PASS if passes else RuleResult.FAIL


def _check(options: GateOptions) -> None:
    for name in ("asr_after_max", "fid_increase_max"):
        limit = getattr(options, name)
        if not (math.isfinite(limit) and limit >= 0.0):
            raise InputError(f"gate.{name} is {limit}", expected="a finite number, not negative", action="set it")
    for name in ("champion", "challenger"):
        alias = getattr(options, name)
        if not ALIAS.fullmatch(alias):
            raise InputError(f"gate.{name} is {alias!r}", expected="letters, digits, _ and -", action="rename it")
    if options.champion == options.challenger:
        raise InputError(
            f"gate.champion and gate.challenger are both {options.champion!r}",
            expected="two different aliases",
            action="rename one: a repaired model must not become the champion by itself",
        )
