"""Signed decisions between the register stage, the registry and those who check: keys, statements, tags.

The private key comes from `DIFFDEFEND_SIGNING_KEY` (its PEM) or from the file `signing.key_file`; it is read here and
goes nowhere else. An envelope lies beside the report and in the tag of the version it is about. Where it would be too
long for a tag, the tag holds its sha256 and its URI.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Outcome, Verdict
from diffdefend_core.config import Settings
from diffdefend_core.errors import DiffDefendError, InputError
from diffdefend_core.gate import signing
from diffdefend_core.gate.policy import timestamp
from diffdefend_core.gate.statement import FAILED, PASSED, Predicate, Reason, Statement
from diffdefend_core.io import folders, registry
from diffdefend_core.io.store import open_store
from diffdefend_core.provenance import code_version
from diffdefend_core.stages.announce import Announcement, Version

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

KEY_VARIABLE = "DIFFDEFEND_SIGNING_KEY"
FILE, ORIGINAL_FILE = "attestation.json", "attestation_original.json"
MAX_TAG = 5000

_REFERENCE = re.compile(r"sha256:([0-9a-f]{64}) (\S+)")
_KEY_ID = re.compile(r"[0-9a-f]{64}")


def read_key(settings: Settings) -> bytes | None:
    """Return the private key's PEM, None if no key is configured. Raises InputError if its file cannot be read."""
    text = os.environ.get(KEY_VARIABLE, "")
    if text.strip():
        return text.encode()
    path = settings.signing.key_file
    return _read(Path(path), "signing.key_file") if path else None


def signer(settings: Settings) -> CryptoSigner | None:
    """Return the signer of the configured key, None if there is none. Raises InputError, MissingExtraError."""
    pem = read_key(settings)
    if pem is None:
        return None
    return signing.read_signer(pem, KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else "signing.key_file")


def trusted_keys(settings: Settings) -> dict[str, SSlibKey]:
    """Return the trusted public keys by key id. Raises InputError at a file that is none."""
    given = settings.signing.trusted_keys
    keys = {}
    for place in [given] if isinstance(given, str) else given:
        for path in _public_files(Path(place).expanduser()) if place else ():
            key = signing.read_public_key(_read(path, "signing.trusted_keys"), str(path))
            keys[str(key.keyid)] = key
    return keys


def revoked_keys(settings: Settings) -> frozenset[str]:
    """Return the revoked key ids; `#` begins a comment. Raises InputError at a line that is no whole key id."""
    path = settings.signing.revoked_keys
    if not path:
        return frozenset()
    text = _read(Path(path).expanduser(), "signing.revoked_keys").decode("utf-8", errors="replace")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if line and not _KEY_ID.fullmatch(line):
            raise InputError(
                f"{path}, line {number}: {line[:80]!r} is no key id",
                expected="the 64 hex digits that `diffdefend key generate` printed",
                action="correct the line: a key that is not named exactly is not revoked",
            )
    return frozenset(line for line in lines if line)


def period(settings: Settings, now: datetime) -> int:
    """Return the number of the half validity that `now` lies in: within it, a retry finds its own signature again."""
    return int(now.timestamp() // (settings.signing.valid_days * 86400 / 2))


def statements(
    decision: GateDecision,
    model: ModelRef,
    verdict: Verdict,
    candidate: Candidate,
    told: Announcement,
    *,
    valid_days: int,
    now: datetime,
) -> dict[str, Statement]:
    """Return what is signed, by file name: on what leaves the gate, and on the scanned version if that is another.

    If nothing passes, the first is on the scanned model itself, with the result FAILED.
    """
    repaired = decision.outcome is Outcome.REPAIRED
    expires = now + timedelta(days=valid_days)
    scanned = Statement(
        target=_target(told.original, decision.model_name),
        weights=model.weights_sha256,
        predicate=Predicate(
            model_digest=model.digest,
            policy_digest=decision.policy_digest,
            calibration_digest=verdict.calibration_digest,
            code_version=code_version(),
            result=PASSED if decision.outcome is Outcome.PROMOTED else FAILED,
            outcome=Outcome.QUARANTINED if repaired else decision.outcome,
            failed=("verdict-clean",) if repaired else tuple(rule.id for rule in decision.rules if rule.blocks),
            waivers=() if repaired else decision.waivers,
            verdict=verdict.word,
            probability=verdict.probability,
            time=timestamp(now),
            expires=timestamp(expires),
        ),
    )  # fmt: skip
    if told.passing is None or told.passing == told.original:
        return {FILE: scanned}
    leaving = _repaired(scanned, decision, candidate) if repaired else scanned
    first = dataclasses.replace(leaving, target=_target(told.passing, decision.model_name))
    return {FILE: first} if told.original is None else {FILE: first, ORIGINAL_FILE: scanned}


def _repaired(scanned: Statement, decision: GateDecision, candidate: Candidate) -> Statement:
    """Return the statement on the repaired model in the place of that on the scanned one."""
    assert candidate.purified is not None
    rescan = candidate.purified.rescan
    predicate = dataclasses.replace(
        scanned.predicate, model_digest=candidate.purified.digest, calibration_digest=rescan.calibration_digest,
        result=PASSED, outcome=decision.outcome, failed=(), waivers=decision.waivers, verdict=rescan.word,
        probability=rescan.probability,
    )  # fmt: skip
    return Statement(target=scanned.target, weights=candidate.purified.weights_sha256, predicate=predicate)


def tags(gate_uri: str, told: Announcement) -> dict[Version, str]:
    """Return the text of the tag for each version that the decision folder holds a signed statement on."""
    manifest = folders.finished(gate_uri, "register")
    names = {file.path for file in manifest.files}
    about = {FILE: told.version, ORIGINAL_FILE: told.original}
    return {
        version: _tag_text(folders.read_file(gate_uri, name).decode(), f"{gate_uri}{name}")
        for name, version in about.items()
        if name in names and version is not None
    }


def read_tag(text: str) -> tuple[str | None, list[Reason]]:
    """Return the envelope of a tag, fetched and compared with its sha256 where the tag only names it; else reasons."""
    if not text:
        return None, [Reason("unsigned", "the version carries no signed decision")]
    if text.startswith("{"):
        return text, []
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None, [Reason("unreadable", "the tag of the signed decision is damaged or cut off")]
    return _fetch(match[2], match[1])


def read_envelope(path_or_uri: str) -> tuple[str | None, list[Reason]]:
    """Return the envelope in a file, at a local path or a URI; else reasons."""
    if "://" in path_or_uri:
        return _fetch(path_or_uri, None)
    return _read(Path(path_or_uri), "--decision").decode("utf-8", errors="replace"), []


def _fetch(uri: str, sha256: str | None) -> tuple[str | None, list[Reason]]:
    folder, _, name = uri.rpartition("/")
    content = b""
    try:
        store, prefix = open_store(folder)
        for chunk in store.read(prefix + name):
            content += chunk
            if len(content) > signing.MAX_ENVELOPE:
                break
    except DiffDefendError as error:
        return None, [Reason("unreadable", f"the signed decision cannot be read: {error.found}")]
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return None, [Reason("unreadable", f"the signed decision at {uri[:200]} is not the one that the tag names")]
    return content.decode("utf-8", errors="replace"), []


def _tag_text(envelope: str, uri: str) -> str:
    if len(envelope) <= MAX_TAG:
        return envelope
    return f"sha256:{hashlib.sha256(envelope.encode()).hexdigest()} {uri}"


def _target(version: Version | None, name: str) -> str:
    return registry.model_uri(*version) if version is not None else name


def _public_files(place: Path) -> list[Path]:
    return sorted(place.glob("*.pub")) if place.is_dir() else [place]


def _read(path: Path, setting: str) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(signing.MAX_ENVELOPE + 1)
    except OSError as error:
        raise InputError(
            f"{setting}: {path} cannot be read ({error.strerror or type(error).__name__})",
            expected="a file that is there",
            action="correct the path or the permissions",
        ) from error
