"""Versions with signed decisions that were never scanned, for tests and benchmarks of whole registries."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from diffdefend_core.artifacts import Outcome, Word
from diffdefend_core.gate.policy import shipped_policy, timestamp
from diffdefend_core.gate.signing import sign
from diffdefend_core.gate.statement import FAILED, PASSED, Predicate, Statement
from diffdefend_core.io import registry


def decided_tags(
    signer: object, target: str, *, word: Word = Word.CLEAN, days: int = 90, policy: str = ""
) -> dict[str, str]:
    """Return the tags of a decision by the shipped policy on `models:/name/version`, signed now."""
    now, digest = datetime.now(UTC), hashlib.sha256(target.encode()).hexdigest()
    policy = policy or shipped_policy().digest()
    passed = word is Word.CLEAN
    outcome = Outcome.PROMOTED if passed else Outcome.QUARANTINED
    predicate = Predicate(
        model_digest=digest, policy_digest=policy, calibration_digest="c" * 64, code_version="test",
        result=PASSED if passed else FAILED, outcome=outcome, failed=() if passed else ("verdict-clean",), waivers=(),
        verdict=word, probability=0.01 if passed else 0.99, time=timestamp(now),
        expires=timestamp(now + timedelta(days=days)),
    )  # fmt: skip
    statement = Statement(target=target, weights={"unet/w.safetensors": digest}, predicate=predicate)
    return {
        registry.DIGEST_TAG: digest, registry.ATTESTATION_TAG: sign(statement.to_bytes(), signer),  # type: ignore[arg-type]
        "diffdefend.verdict": word.value, "diffdefend.outcome": outcome.value, "diffdefend.policy_digest": policy,
    }  # fmt: skip
