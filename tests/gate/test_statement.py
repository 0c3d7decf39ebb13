"""A statement holds for the very files, name, rules and time it was made for; each difference is a reason."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from diffdefend_core.artifacts import FileDigest, Outcome, UsedWaiver, Word
from diffdefend_core.errors import ArtifactError
from diffdefend_core.gate import signing
from diffdefend_core.gate.policy import Policy, build_policy
from diffdefend_core.gate.statement import PASSED, Predicate, Statement, objections

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DIGEST, WEIGHTS = "a" * 64, "b" * 64
RULE = {"id": "r", "metric": "scorecard.before.fid", "direction": "at_most", "threshold": 7.0}
WAIVER = {"rule": "r", "model_digest": DIGEST, "statement": "Accepted for now.", "owner": "ann",
          "expires": "2026-06-30"}  # fmt: skip
FILES = (
    FileDigest(path="unet/w.safetensors", size=1, sha256=WEIGHTS),
    FileDigest(path="model_index.json", size=1, sha256="c" * 64),
)


def policy(threshold: float = 7.0, waivers: bool = True) -> Policy:
    rule = {**RULE, "threshold": threshold}
    return build_policy({"version": 1, "rules": [rule], "waivers": [WAIVER] if waivers else []})


def statement(**changes: Any) -> Statement:
    waiver = policy().waivers[0]
    used = UsedWaiver(
        rule="r", statement=waiver.statement, owner="ann", expires="2026-06-30T23:59:59Z", digest=waiver.digest()
    )
    given: dict[str, Any] = {
        "model_digest": DIGEST, "policy_digest": policy().digest(), "calibration_digest": "d" * 64,
        "code_version": "1", "result": PASSED, "outcome": Outcome.PROMOTED, "failed": (), "waivers": (used,),
        "verdict": Word.CLEAN, "probability": 0.02, "time": "2026-05-01T00:00:00Z", "expires": "2026-07-30T00:00:00Z",
    }  # fmt: skip
    return Statement(
        target="models:/m/1", weights={"unet/w.safetensors": WEIGHTS}, predicate=Predicate(**{**given, **changes})
    )


def codes(made: Statement, **changes: Any) -> set[str]:
    given: dict[str, Any] = {
        "target": "models:/m/1", "files": FILES, "digest": DIGEST, "policy": policy(), "now": NOW, **changes
    }  # fmt: skip
    return {reason.code for reason in objections(made, **given)}


def test_it_survives_its_bytes_and_holds() -> None:
    made = Statement.from_bytes(statement().to_bytes())
    assert made == statement()
    assert codes(made) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"result": "FAILED"}, "failed"),
        ({"result": "passed"}, "failed"),
        ({"outcome": Outcome.QUARANTINED}, "failed"),
        ({"verdict": Word.BACKDOORED}, "failed"),
        ({"verdict": Word.INCONCLUSIVE}, "failed"),
        ({"policy_digest": "e" * 64}, "old-policy"),
        ({"model_digest": "e" * 64}, "changed-bytes"),
        ({"expires": "2026-06-01T00:00:00Z"}, "expired"),
        ({"expires": "2027-06-01T00:00:00"}, "expired"),
        ({"expires": "never"}, "expired"),
    ],
)
def test_each_part_of_the_predicate_counts(changes: dict[str, Any], expected: str) -> None:
    assert codes(statement(**changes)) == {expected}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": "models:/m/2"}, {"other-subject"}),
        ({"target": "models:/n/1"}, {"other-subject"}),
        ({"target": None}, set()),
        ({"digest": "e" * 64}, {"changed-bytes"}),
        ({"files": FILES[1:]}, {"changed-bytes"}),
        ({"files": (dataclasses.replace(FILES[0], sha256="e" * 64), FILES[1])}, {"changed-bytes"}),
        ({"policy": policy(6.0)}, {"old-policy"}),
        ({"policy": policy(waivers=False)}, {"waiver-withdrawn"}),
        ({"now": datetime(2026, 7, 1, tzinfo=UTC)}, {"waiver-expired"}),
        ({"now": datetime(2026, 8, 1, tzinfo=UTC)}, {"waiver-expired", "expired"}),
    ],
)
def test_each_part_of_the_world_counts(changes: dict[str, Any], expected: set[str]) -> None:
    assert codes(statement(), **changes) == expected


def test_a_statement_that_names_no_weights_holds_for_nothing() -> None:
    assert codes(dataclasses.replace(statement(), weights={})) == {"other-subject"}


@pytest.mark.parametrize("payload", [b"", b"7", b"[]", b"{}", b"\xff", statement().to_bytes().replace(b"/v1", b"/v2")])
def test_other_bytes_are_no_statement(payload: bytes) -> None:
    with pytest.raises(ArtifactError):
        Statement.from_bytes(payload)


def test_only_a_trusted_key_that_is_not_revoked_opens_an_envelope() -> None:
    pair, other = signing.generate_key(), signing.generate_key()
    keys = {pair.key_id: signing.read_public_key(pair.public_pem, "k")}
    text = signing.sign(b"payload", signing.read_signer(pair.private_pem, "k"))
    assert signing.verified_payload(text, keys, ()) == (b"payload", [])
    strangers = {other.key_id: signing.read_public_key(other.public_pem, "k")}
    changed = text.replace("cGF5bG9hZA==", "cGF5bG9hZB==").replace("cGF5bG9hZB==", "cGF5bG9hZQ==")
    for given, trusted, revoked, code in (
        (text, keys, {pair.key_id}, "revoked-key"),
        (text, strangers, (), "unknown-key"),
        (text, {}, (), "unknown-key"),
        (changed, keys, (), "bad-signature"),
        (text[:-3], keys, (), "unreadable"),
        (text.replace("in-toto", "other"), keys, (), "unreadable"),
        (text.replace(pair.key_id, other.key_id), strangers, (), "bad-signature"),
    ):
        payload, reasons = signing.verified_payload(given, trusted, revoked)
        assert (payload, [reason.code for reason in reasons]) == (None, [code])
