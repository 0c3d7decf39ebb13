"""The gate's rules and the decision: pure functions over the records of one model, no IO and no torch.

The rules here always hold: the verdict is clean, the records agree, the metrics are there. The policy adds its own,
which are judged in `judge`. A rule passes, fails or could not be evaluated; only the first does not block, except for a
failing rule that only warns or that is waived for this model. A model is promoted when it is clean and nothing blocks,
it is repaired when it was backdoored and nothing blocks its repaired version; all else is quarantined.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from diffdefend_core.artifacts import (
    Action,
    Candidate,
    GateDecision,
    Outcome,
    Rule,
    RuleResult,
    Scorecard,
    UsedWaiver,
    Verdict,
    Word,
)
from diffdefend_core.gate import judge
from diffdefend_core.gate.policy import Policy, Waiver, timestamp

FixedRule = Callable[[Verdict, Candidate, Scorecard], Rule]


def verdict_is_clean(verdict: Verdict, candidate: Candidate, scorecard: Scorecard) -> Rule:
    """The model that would leave the gate is clean: by its scan, or after a repair by the scan of the repaired one.

    No scan outweighs a shift that the repair knows, and that still fires when its rounds are used up. Where no known
    shift fired before the repair, nothing shows that it did anything, unless the true trigger was measured.
    """
    judged, whose = _judged_verdict(verdict, candidate)
    statement = f"the scan of the {whose} says clean (it says {judged.word}, probability {judged.probability:.3g})"
    repair = candidate.purified
    if repair is not None and repair.still_fires is None:
        statement += "; nothing else speaks for the repair, for no found shift fired before it"
        if judge.measured("scorecard.after.asr_known", verdict, scorecard) is None:
            return Rule(id="verdict-clean", statement=statement, result=RuleResult.NOT_EVALUATED)
    elif repair is not None and not repair.is_silent:
        statement += f", and no found shift still fires (one does in {repair.still_fires:.1%})"
        return Rule(id="verdict-clean", statement=statement, result=RuleResult.FAIL)
    if judged.word is Word.INCONCLUSIVE or not 0.0 <= judged.probability <= 1.0:
        return Rule(id="verdict-clean", statement=statement, result=RuleResult.NOT_EVALUATED)
    passes = judged.word is Word.CLEAN and _branch_fits(verdict, candidate)
    return Rule(id="verdict-clean", statement=statement, result=_result(passes))


def records_agree(verdict: Verdict, candidate: Candidate, scorecard: Scorecard) -> Rule:
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


def metrics_are_there(verdict: Verdict, candidate: Candidate, scorecard: Scorecard) -> Rule:
    """Every metric that the gate needs was measured and is finite; a missing one is not evaluated and blocks."""
    needed = ["before.fid"]
    if candidate.action is Action.PURIFY:
        needed += ["after.fid", "after.asr"]
    missing = [path for path in needed if judge.measured(f"scorecard.{path}", verdict, scorecard) is None]
    names = ", ".join(needed)
    statement = f"measured and finite: {names}" + (f" (missing: {', '.join(missing)})" if missing else "")
    result = RuleResult.NOT_EVALUATED if missing else RuleResult.PASS
    return Rule(id="metrics-there", statement=statement, result=result)


FIXED_IN_WORDS = (
    ("verdict-clean", "the scan of the model that leaves the gate says clean, and its repair silenced what had fired"),
    ("records-agree", "branch, repair and scans speak of one model and one calibration"),
    ("metrics-there", "before.fid, and after a repair after.fid and after.asr, are measured and finite"),
)
FIXED: tuple[FixedRule, ...] = (verdict_is_clean, records_agree, metrics_are_there)


def decide(
    verdict: Verdict, candidate: Candidate, scorecard: Scorecard, policy: Policy, *, model_name: str, now: datetime
) -> GateDecision:
    """Return the gate's decision, without what only the registry knows (versions, aliases, run).

    `model_digest` of the decision is that of the model that would leave the gate: the repaired one if there is one.
    `now`, a time with its zone, decides which waivers have expired.
    """
    purified = candidate.purified
    digest = purified.digest if purified is not None else verdict.model_digest
    judged, _ = _judged_verdict(verdict, candidate)
    asked = [rule for rule in policy.rules if judge.asked(rule, candidate, scorecard)]
    results = [judge.waive(judge.judge(rule, judged, scorecard), policy, digest, now) for rule in asked]
    fixed = tuple(rule(verdict, candidate, scorecard) for rule in FIXED)
    rules = fixed + tuple(rule for rule, _ in results)
    return GateDecision(
        outcome=_outcome(verdict, candidate, rules),
        model_name=model_name,
        model_digest=digest,
        policy_digest=policy.digest(),
        rules=rules,
        waivers=tuple(_used(waiver) for _, waiver in results if waiver is not None),
    )


def _used(waiver: Waiver) -> UsedWaiver:
    return UsedWaiver(
        rule=waiver.rule,
        statement=waiver.statement,
        owner=waiver.owner,
        expires=timestamp(waiver.expires),
        digest=waiver.digest(),
    )


def _outcome(verdict: Verdict, candidate: Candidate, rules: tuple[Rule, ...]) -> Outcome:
    if not rules or any(rule.blocks for rule in rules):
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


def _result(passes: bool) -> RuleResult:
    return RuleResult.PASS if passes else RuleResult.FAIL
