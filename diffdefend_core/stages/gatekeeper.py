"""Whether a model may be deployed: its signed decision against its bytes, here and now.

Nothing that the registry says is believed: the bytes are read and digested anew, and only what a trusted key signed
about exactly these bytes, this name and this version counts. What cannot be read is a reason for no; only a registry
that does not answer and settings that cannot be used are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from diffdefend_core.artifacts import FileDigest, Outcome
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError, ModelRejectedError, StoreError
from diffdefend_core.gate.policy import Policy
from diffdefend_core.gate.signing import verified_payload
from diffdefend_core.gate.statement import Predicate, Reason, Statement, failed, objections, recorded_objections
from diffdefend_core.io import registry
from diffdefend_core.io.folders import content_digest
from diffdefend_core.io.store import to_uri
from diffdefend_core.stages import announce, attestation
from diffdefend_core.stages.policies import read_policy
from diffdefend_core.stages.source import digest_model

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

# The first group that one of the reasons belongs to is the state of the version in an audit.
_STATES = {
    "changed": ("changed-bytes", "other-subject", "no-bytes"),
    "failed": ("failed",),
    "expired": ("expired", "waiver-expired", "waiver-withdrawn", "old-policy"),
    "untrusted": ("unreadable", "bad-signature", "unknown-key", "revoked-key", "no-trusted-key"),
    "unscanned": ("unsigned",),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The answer about one model: it holds exactly when there is no reason against it.

    `version` is `models:/name/version`, None for a folder; `digest` is that of the bytes, None if they could not be
    read; `predicate` is what a trusted key signed, None if nothing was.
    """

    source: str
    version: str | None
    digest: str | None
    predicate: Predicate | None
    reasons: tuple[Reason, ...]

    @property
    def holds(self) -> bool:
        """Whether the model may be deployed."""
        return not self.reasons and self.predicate is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain JSON values."""
        return {
            "source": self.source,
            "version": self.version,
            "holds": self.holds,
            "model_digest": self.digest,
            "reasons": [{"code": reason.code, "text": reason.text} for reason in self.reasons],
            "decision": self.predicate.to_dict() if self.predicate is not None else None,
        }


class Gatekeeper:
    """Answers by the policy and the keys of the settings, which are read once; `now` is the clock unless given.

    Raises InputError when policy, keys or revocations cannot be used.
    """

    def __init__(self, settings: Settings, *, now: datetime | None = None) -> None:
        self._settings = settings
        self._tracking_uri = settings.tracking_uri
        self._given_now = now
        self._policy: Policy = read_policy(settings)
        self._keys: Mapping[str, SSlibKey] = attestation.trusted_keys(settings)
        self._revoked = attestation.revoked_keys(settings)

    def check(self, source: str, *, decision: str | None = None) -> Check:
        """Return the answer about `models:/name@alias`, `models:/name/version`, a folder, or an s3:// or file:// URI.

        The signed decision is that of the version's tag; `decision` names a file or a URI instead, which a model
        outside of the registry needs. Raises RegistryError if the version is not there, InputError at another URI.
        """
        if not source.startswith("models:"):
            found = attestation.read_envelope(decision) if decision else (None, [_unnamed()])
            return self._answer(source, None, to_uri(source), *found)
        resolved = registry.resolve(self._tracking_uri, source)
        target = registry.model_uri(resolved.name, resolved.version)
        if decision:
            found = attestation.read_envelope(decision)
        else:
            tags = registry.tags_of(self._tracking_uri, resolved.name, resolved.version)
            found = attestation.read_tag(tags.get(registry.ATTESTATION_TAG, ""))
        return self._answer(source, target, resolved.source_uri, *found)

    @property
    def policy_digest(self) -> str:
        """The digest of the policy that decisions are held against."""
        return self._policy.digest()

    @property
    def trusts(self) -> bool:
        """Whether there is a trusted key: without one no decision stands."""
        return bool(self._keys)

    def recorded(self, target: str, tags: Mapping[str, str]) -> tuple[Predicate | None, list[Reason]]:
        """Return the decision that stands by the tags of the version `target` alone, else None and why none does.

        This is the cheap half of `check`: nothing of the model is read, so bytes that changed since do not show. The
        decision may be that the model failed.
        """
        statement, reasons = self._signed(*attestation.read_tag(tags.get(registry.ATTESTATION_TAG, "")))
        if statement is None:
            return None, reasons
        reasons = recorded_objections(
            statement, target=target, recorded=tags.get(registry.DIGEST_TAG), policy=self._policy, now=self._now()
        )
        return (None, reasons) if reasons else (statement.predicate, [])

    def undecided(self, alias: str) -> int:
        """Return how many versions with this alias have no decision that stands and passes, by their tags alone.

        Raises RegistryError.
        """
        found = 0
        for (name, version), names in registry.all_aliases(self._tracking_uri).items():
            if alias in names:
                tags = registry.tags_of(self._tracking_uri, name, version)
                predicate, _ = self.recorded(registry.model_uri(name, version), tags)
                found += predicate is None or failed(predicate) is not None
        return found

    def audit(self, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield one row for each alias of the registered models, of all unless `names` are given.

        A row holds `model`, `alias`, `version`, `state` (`ok`, `unscanned`, `unsigned`, `changed`, `expired`, `failed`
        or `untrusted`) and `reasons`. Raises RegistryError, InputError.
        """
        for name in names or registry.model_names(self._tracking_uri):
            seen: dict[str, tuple[str, list[str]]] = {}
            for alias, version in sorted(registry.aliases(self._tracking_uri, name).items()):
                if version not in seen:
                    seen[version] = self._state(name, version)
                state, reasons = seen[version]
                yield {"model": name, "alias": alias, "version": version, "state": state, "reasons": reasons}

    def promote(self, source: str, alias: str) -> tuple[Check, bool]:
        """Move the alias to the version if its decision holds; return the last answer and whether the alias is there.

        The version is checked before the move, and again by the alias after it. If it holds no longer, the alias goes
        back to where it was. Raises InputError, RegistryError.
        """
        announce.check_alias(alias, "--alias")
        resolved = registry.resolve(self._tracking_uri, source)
        name, version = resolved.name, resolved.version
        first = self.check(registry.model_uri(name, version))
        if not first.holds:
            return first, False
        before = registry.alias_holder(self._tracking_uri, name, alias)
        registry.move_alias(self._tracking_uri, name, alias, version)
        second = self.check(f"models:/{name}@{alias}")
        if second.holds and second.version == first.version:
            return second, True
        if before is None or before == version:
            registry.drop_alias(self._tracking_uri, name, alias, version)
        elif registry.alias_holder(self._tracking_uri, name, alias) == version:
            registry.move_alias(self._tracking_uri, name, alias, before)
        return second, False

    def _now(self) -> datetime:
        """Return the time that was given, else the clock's: a service outlives decisions."""
        return self._given_now or datetime.now(UTC)

    def _answer(
        self, source: str, target: str | None, model_uri: str, envelope: str | None, problems: list[Reason]
    ) -> Check:
        statement, reasons = self._signed(envelope, problems)
        files, unread = _files(model_uri)
        digest = content_digest(files) if files else None
        if statement is not None and digest is not None:
            reasons += objections(
                statement, target=target, files=files, digest=digest, policy=self._policy, now=self._now()
            )
        return Check(
            source=source,
            version=target,
            digest=digest,
            predicate=statement.predicate if statement is not None else None,
            reasons=tuple(reasons + unread),
        )

    def _signed(self, envelope: str | None, problems: list[Reason]) -> tuple[Statement | None, list[Reason]]:
        """Return what a trusted key signed, else None and the reasons."""
        if envelope is None:
            return None, list(problems)
        if not self._keys:
            return None, [Reason("no-trusted-key", "no trusted key is configured (signing.trusted_keys)")]
        payload, reasons = verified_payload(envelope, self._keys, self._revoked)
        if payload is None:
            return None, reasons
        try:
            return Statement.from_bytes(payload), []
        except ArtifactError as error:
            return None, [Reason("unreadable", error.found)]

    def _state(self, name: str, version: str) -> tuple[str, list[str]]:
        try:
            answer = self.check(registry.model_uri(name, version))
        except InputError as error:  # a name that no URI can hold
            return "untrusted", [error.found]
        reasons = [reason.text for reason in answer.reasons]
        if answer.holds:
            return "ok", reasons
        codes = {reason.code for reason in answer.reasons}
        state = next((state for state, group in _STATES.items() if codes & set(group)), "untrusted")
        return self._unsigned_state(name, version) if codes >= {"unsigned"} else state, reasons

    def _unsigned_state(self, name: str, version: str) -> str:
        """Return the state of a version without a signed decision, by the outcome that its tags claim."""
        outcome = registry.tags_of(self._tracking_uri, name, version).get(f"{announce.PREFIX}outcome")
        if outcome is None:
            return "unscanned"
        return "failed" if outcome == Outcome.QUARANTINED.value else "unsigned"


def _files(uri: str) -> tuple[tuple[FileDigest, ...], list[Reason]]:
    try:
        return digest_model(uri), []
    except (InputError, ModelRejectedError, StoreError) as error:
        return (), [Reason("no-bytes", f"the model's files cannot be read: {error.found}")]


def _unnamed() -> Reason:
    return Reason("unsigned", "no signed decision is named (--decision FILE or URI)")
