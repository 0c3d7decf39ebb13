"""Whether a model may be deployed: its signed decision against its bytes, here and now.

Nothing that the registry says is believed: the bytes are read and digested anew, and only what a trusted key signed
about exactly these bytes, this name and this version counts. What cannot be read is a reason for no; only a registry
that does not answer and settings that cannot be used are errors.

For a version that MLflow copied from another, the decision on that other one speaks, as it stands there now: the copy
brings its tags along, but what becomes of the decision later shows at the origin alone. The bytes that are read are
those of the copy.
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
    "untrusted": ("unreadable", "bad-signature", "unknown-key", "revoked-key", "no-trusted-key", "no-origin"),
    "unscanned": ("unsigned",),
}

# Copies of copies that are followed: development, staging, production and some to spare. Names that were deleted and
# registered anew can form a ring.
DEEPEST = 8


@dataclass(frozen=True, kw_only=True)
class Check:
    """The answer about one model: it holds exactly when there is no reason against it.

    `version` is `models:/name/version`, None for a folder; `origin` is the version that it is a copy of, if the
    decision is looked for there; `digest` is that of the bytes, None if they could not be read; `predicate` is what a
    trusted key signed, None if nothing was.
    """

    source: str
    version: str | None
    origin: str | None
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
            "copy_of": self.origin,
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

        The signed decision is that of the version's tag, or of the version that it is a copy of; `decision` names a
        file or a URI instead, which a model outside of the registry needs, and which must be about the version itself.
        Raises RegistryError if the version is not there, InputError at another URI.
        """
        if not source.startswith("models:"):
            found = attestation.read_envelope(decision) if decision else (None, [_unnamed()])
            return self._answer(source, None, None, to_uri(source), *self._signed(*found))
        resolved = registry.resolve(self._tracking_uri, source)
        target = registry.model_uri(resolved.name, resolved.version)
        if decision:
            signed = self._signed(*attestation.read_envelope(decision))
            return self._answer(source, target, target, resolved.source_uri, *signed)
        held = registry.version_of(self._tracking_uri, resolved.name, resolved.version)
        speaker, statement, reasons = self._speaker(held)
        return self._answer(source, target, speaker.uri, resolved.source_uri, statement, reasons)

    @property
    def policy_digest(self) -> str:
        """The digest of the policy that decisions are held against."""
        return self._policy.digest()

    @property
    def trusts(self) -> bool:
        """Whether there is a trusted key: without one no decision stands."""
        return bool(self._keys)

    def recorded(self, version: registry.Listed) -> tuple[Predicate | None, list[Reason]]:
        """Return the decision that stands by the tags of the version alone, else None and why none does.

        This is the cheap half of `check`: nothing of the model is read, so bytes that changed since do not show. The
        decision may be that the model failed. Raises RegistryError.
        """
        speaker, statement, reasons = self._speaker(version)
        if statement is None:
            return None, reasons
        reasons = recorded_objections(
            statement, target=speaker.uri, recorded=speaker.tags.get(registry.DIGEST_TAG), policy=self._policy,
            now=self._now(),
        )  # fmt: skip
        return (None, reasons) if reasons else (statement.predicate, [])

    def undecided(self, alias: str) -> int:
        """Return how many versions with this alias have no decision that stands and passes, by their tags alone.

        Raises RegistryError.
        """
        found = 0
        for (name, version), names in registry.all_aliases(self._tracking_uri).items():
            if alias in names:
                predicate, _ = self.recorded(registry.version_of(self._tracking_uri, name, version))
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

    def promote(self, source: str, alias: str, *, to: str | None = None) -> tuple[Check, bool]:
        """Move the alias to the version if its decision holds; return the last answer and whether the alias is there.

        With `to`, the version is copied into that registered model, once, and the alias is that of the copy. It is
        checked before anything is done, and again by the alias at the end. If it holds no longer, the alias goes back
        to where it was; a copy stays, without it. Raises InputError, RegistryError.
        """
        announce.check_alias(alias, "--alias")
        resolved = registry.resolve(self._tracking_uri, source)
        name, version = resolved.name, resolved.version
        if to is not None:
            _check_destination(name, to)
        first = self.check(registry.model_uri(name, version))
        if not first.holds:
            return first, False
        if to is not None:
            name, (version, made) = to, registry.copy_version(self._tracking_uri, name, version, to)
            if not made:  # the gate may have decided against a copy that was there
                first = self.check(registry.model_uri(name, version))
        return self._place(name, alias, version) if first.holds else (first, False)

    def _place(self, name: str, alias: str, version: str) -> tuple[Check, bool]:
        """Move the alias to a version that holds, and back again if it holds no longer then."""
        before = registry.alias_holder(self._tracking_uri, name, alias)
        registry.move_alias(self._tracking_uri, name, alias, version)
        second = self.check(f"models:/{name}@{alias}")
        if second.holds and second.version == registry.model_uri(name, version):
            return second, True
        if before is None or before == version:
            registry.drop_alias(self._tracking_uri, name, alias, version)
        elif registry.alias_holder(self._tracking_uri, name, alias) == version:
            registry.move_alias(self._tracking_uri, name, alias, before)
        return second, False

    def _now(self) -> datetime:
        """Return the time that was given, else the clock's: a service outlives decisions."""
        return self._given_now or datetime.now(UTC)

    def _speaker(self, version: registry.Listed) -> tuple[registry.Listed, Statement | None, list[Reason]]:
        """Return the version whose tag decides on this one, with what is signed there, else None and the reasons.

        It is the version itself, unless it is a copy without a decision of its own: then the one that it was copied
        from speaks. That one must be there and lie where the copy lies, else the name is another model's by now.
        """
        held, location = version, None
        for _ in range(DEEPEST + 1):
            statement, reasons = self._signed(*attestation.read_tag(held.tags.get(registry.ATTESTATION_TAG, "")))
            origin = registry.copied_from(held.source)
            if origin is None or (statement is not None and statement.target == held.uri):
                return held, statement, reasons
            location = location or registry.download_uri(self._tracking_uri, version.name, version.version)
            found = registry.find_version(self._tracking_uri, *origin)
            if found is None or registry.download_uri(self._tracking_uri, *origin) != location:
                what = "is not there any more, or not to be read" if found is None else "is another model by now"
                return version, None, [Reason("no-origin", f"it is a copy, and {held.source} {what}")]
            held = found
        return version, None, [Reason("no-origin", f"it is a copy of a copy, more than {DEEPEST} times")]

    def _answer(
        self, source: str, target: str | None, about: str | None, model_uri: str, statement: Statement | None,
        reasons: list[Reason],
    ) -> Check:  # fmt: skip
        """Hold what is signed about the version `about` against the bytes of `target`: itself, or a copy of it."""
        files, unread = _files(model_uri)
        digest = content_digest(files) if files else None
        if statement is not None and digest is not None:
            reasons += objections(
                statement, target=about, files=files, digest=digest, policy=self._policy, now=self._now()
            )
        return Check(
            source=source,
            version=target,
            origin=about if about != target else None,
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


def _check_destination(name: str, to: str) -> None:
    registry.check_name(to, "--to")
    if to == name:
        raise InputError(
            f"--to {to[:80]!r} is the model itself",
            expected="another registered model, which gets a copy",
            action="leave --to out to move an alias within the model",
        )


def _files(uri: str) -> tuple[tuple[FileDigest, ...], list[Reason]]:
    try:
        return digest_model(uri), []
    except (InputError, ModelRejectedError, StoreError) as error:
        return (), [Reason("no-bytes", f"the model's files cannot be read: {error.found}")]


def _unnamed() -> Reason:
    return Reason("unsigned", "no signed decision is named (--decision FILE or URI)")
