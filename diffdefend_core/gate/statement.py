"""The signed form of a decision: an in-toto statement v1 about one model, and the reasons for which it does not hold.

The subject lists the sha256 of every weights file, and the registered version with the digest of all files. The
predicate says by which policy, calibration and code the model was judged, with which result, and until when that holds.
No IO and no keys here: `signing` signs and verifies the bytes of a statement, this module knows what they say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from diffdefend_core.artifacts import FileDigest, Outcome, UsedWaiver, Word
from diffdefend_core.errors import ArtifactError
from diffdefend_core.gate.policy import Policy
from diffdefend_core.records import Record

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:diffdefend:gate-decision:v1"
MODEL_DIGEST = "diffdefend-files-v1"
PASSED, FAILED = "PASSED", "FAILED"


class Reason(NamedTuple):
    """Why a decision does not hold: a closed word for machines, a sentence for people."""

    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Predicate(Record):
    """What was decided about the subject; times are `2026-01-31T12:00:00Z`.

    `verdict` and `probability` are those of the scan of this very model. `result` is PASSED or FAILED, `failed` names
    the rules that blocked.
    """

    model_digest: str
    policy_digest: str
    calibration_digest: str
    code_version: str
    result: str
    outcome: Outcome
    failed: tuple[str, ...]
    waivers: tuple[UsedWaiver, ...]
    verdict: Word
    probability: float
    time: str
    expires: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """An in-toto statement; `target` is `models:/name/version`, or the name alone of what is not registered."""

    target: str
    weights: Mapping[str, str]
    predicate: Predicate

    def to_bytes(self) -> bytes:
        """Return the statement as one canonical line of JSON, the payload that is signed."""
        subject: list[dict[str, Any]] = [
            {"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(self.weights.items())
        ]
        subject.append({"name": self.target, "digest": {MODEL_DIGEST: self.predicate.model_digest}})
        document = {
            "_type": STATEMENT_TYPE,
            "subject": subject,
            "predicateType": PREDICATE_TYPE,
            "predicate": self.predicate.to_dict(),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Statement:
        """Read a statement whose signature was verified. Raises ArtifactError if it is none of ours."""
        try:
            document = json.loads(payload)
            kinds = (document["_type"], document["predicateType"])
            entries = [(str(item["name"]), dict(item["digest"])) for item in document["subject"]]
            predicate = document["predicate"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _strange(f"{type(error).__name__} while reading it") from error
        models = [(name, digest[MODEL_DIGEST]) for name, digest in entries if MODEL_DIGEST in digest]
        weights = {name: str(digest["sha256"]) for name, digest in entries if "sha256" in digest}
        read = Predicate.from_dict(predicate)
        if kinds != (STATEMENT_TYPE, PREDICATE_TYPE) or len(models) != 1 or models[0][1] != read.model_digest:
            raise _strange("another type or subject")
        return cls(target=models[0][0], weights=weights, predicate=read)


def _strange(what: str) -> ArtifactError:
    return ArtifactError(
        f"the signed payload is no gate decision ({what})",
        expected=f"an in-toto statement with the predicate {PREDICATE_TYPE}",
        action="run the gate again",
    )


def objections(
    statement: Statement, *, target: str | None, files: Sequence[FileDigest], digest: str, policy: Policy, now: datetime
) -> list[Reason]:
    """Return every reason for which the statement does not speak for these files now; none means that it holds.

    `target` is `models:/name/version`, None for files that have no place in a registry; `files` and `digest` are
    computed from the bytes.
    """
    predicate = statement.predicate
    reasons = _about_the_target(statement, target) + _about_the_files(statement, files)
    if digest != predicate.model_digest:
        signed = predicate.model_digest[:12]
        reasons.append(Reason("changed-bytes", f"the files have the digest {digest[:12]}, signed was {signed}"))
    failure = failed(predicate)
    return reasons + ([failure] if failure is not None else []) + _about_the_rules(predicate, policy, now)


def recorded_objections(
    statement: Statement, *, target: str, recorded: str | None, policy: Policy, now: datetime
) -> list[Reason]:
    """Return every reason to decide again, as far as it shows without the bytes; none means that a decision stands.

    `target` is `models:/name/version` and `recorded` the digest that the version's tag holds, None without one. A
    decision that the model failed is a decision: `failed` tells.
    """
    reasons = _about_the_target(statement, target)
    signed = statement.predicate.model_digest
    if recorded != signed:
        held = f"the tag names the digest {recorded[:12]!r}" if recorded else "no tag names the model's digest"
        reasons.append(Reason("changed-bytes", f"{held}, signed was {signed[:12]}"))
    return reasons + _about_the_rules(statement.predicate, policy, now)


def failed(predicate: Predicate) -> Reason | None:
    """Return why the decision lets nothing pass, None if the model passed."""
    passed = predicate.result == PASSED and predicate.outcome is not Outcome.QUARANTINED
    if passed and predicate.verdict is Word.CLEAN:
        return None
    rules = f" ({', '.join(predicate.failed)})" if predicate.failed else ""
    return Reason("failed", f"the decision is {predicate.result}, verdict {predicate.verdict}{rules}")


def _about_the_rules(predicate: Predicate, policy: Policy, now: datetime) -> list[Reason]:
    """Return the reasons that lie in the policy and the clock."""
    reasons = []
    if predicate.policy_digest != policy.digest():
        old, new = predicate.policy_digest[:12], policy.digest()[:12]
        reasons.append(Reason("old-policy", f"it was decided by the policy {old}, the current one is {new}"))
    if not _is_before(now, predicate.expires):
        reasons.append(Reason("expired", f"the decision of {predicate.time} expired on {predicate.expires}"))
    return reasons + _about_the_waivers(predicate, policy, now)


def _about_the_target(statement: Statement, target: str | None) -> list[Reason]:
    reasons = []
    if target is not None and statement.target != target:
        reasons.append(Reason("other-subject", f"the decision is about {statement.target}, not about {target}"))
    if not statement.weights:
        reasons.append(Reason("other-subject", "the decision names no weights file"))
    return reasons


def _about_the_files(statement: Statement, files: Sequence[FileDigest]) -> list[Reason]:
    reasons = []
    here = {file.path: file.sha256 for file in files}
    for name, sha256 in sorted(statement.weights.items()):
        found = here.get(name)
        if found != sha256:
            seen = f"has the sha256 {found[:12]}" if found is not None else "is missing"
            reasons.append(Reason("changed-bytes", f"{name} {seen}, signed was {sha256[:12]}"))
    return reasons


def _about_the_waivers(predicate: Predicate, policy: Policy, now: datetime) -> list[Reason]:
    reasons = []
    standing = {waiver.digest() for waiver in policy.waivers}
    for waiver in predicate.waivers:
        whose = f"the waiver of {waiver.owner} for the rule {waiver.rule}"
        if not _is_before(now, waiver.expires):
            reasons.append(Reason("waiver-expired", f"{whose} expired on {waiver.expires}"))
        if waiver.digest not in standing:
            reasons.append(Reason("waiver-withdrawn", f"{whose} is not in the current policy"))
    return reasons


def _is_before(now: datetime, text: str) -> bool:
    """Whether `now` is before the time; one that cannot be read is over."""
    try:
        return now < datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return False
