"""What the gate tells the model registry, and in which order.

The safe direction is taken at once and every time: a version that does not pass loses the gate's aliases before
anything else happens. The other direction is taken last and once: an alias is given only after tags, report and run
stand, so a crash in between leaves no version in production whose evidence is missing.

An alias moves forward only, from an older version to a newer one, and a decision gives it once. So a retry, a late
run or a scan of old versions takes nothing back from a newer version, nor from a rollback that somebody made by hand.
Run again, a decision renews its tags and reports the aliases as they are by then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Outcome, Verdict, Word
from diffdefend_core.errors import InputError
from diffdefend_core.io import registry
from diffdefend_core.io.tracking import KEY_TAG
from diffdefend_core.options import GateOptions

PREFIX = "diffdefend."
WITHDRAWN_TAG = f"{PREFIX}withdrawn"  # the name of a decision, and the aliases that it took from the version

_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    number: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is announced: a decision with the records behind it; `key` names the decision."""

    key: str
    run_id: str
    candidate_uri: str
    model: ModelRef
    verdict: Verdict
    candidate: Candidate
    decision: GateDecision
    options: GateOptions

    @property
    def original(self) -> Version | None:
        """The version that was scanned, None if the model did not come from the registry."""
        name, number = self.model.registered_name, self.model.registered_version
        return Version(name, number) if name is not None and number is not None else None


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """The registry before the alias is given.

    `passing` is the version that passed the gate, `give` the alias that `finish` will move to it, if any; `aliases`
    are those of the version that the decision is about, `give` included. `actions` are sentences for people.
    """

    passing: Version | None
    original: Version | None
    aliases: tuple[str, ...]
    give: str | None
    actions: tuple[str, ...]

    @property
    def version(self) -> Version | None:
        """The version that the decision is about: what passed, else what was scanned."""
        return self.passing or self.original


def check_alias(alias: str, what: str) -> str:
    """Return an alias that the registry takes; `what` names it in the message. Raises InputError at any other."""
    if not _ALIAS.fullmatch(alias):
        raise InputError(f"{what} is {alias[:80]!r}", expected="letters, digits, _ and -", action="rename it")
    return alias


def check_aliases(options: GateOptions) -> None:
    """Raise InputError unless the gate's aliases are two different ones that the registry takes."""
    check_alias(options.champion, "gate.champion")
    check_alias(options.challenger, "gate.challenger")
    if options.champion == options.challenger:
        raise InputError(
            f"gate.champion and gate.challenger are both {options.champion!r}",
            expected="two different aliases",
            action="rename one: a repaired model must not become the champion by itself",
        )


def prepare(tracking_uri: str, case: Case) -> Announcement:
    """Withdraw what may not stay, register and tag what passes, and return what is left to do. Raises RegistryError."""
    original = case.original
    actions: list[str] = []
    if original is not None:
        actions += _mark_original(tracking_uri, case, original)
    passing = _register_passing(tracking_uri, case)
    give = None
    if passing is not None:
        if passing != original:
            actions.append(f"The {_whose(case)} is version {passing.number} of {passing.name}.")
        give, sentence = _alias_to_give(tracking_uri, case, passing)
        actions.append(sentence)
    about = passing or original
    held = registry.aliases_of(tracking_uri, *about) if about is not None else ()
    aliases = tuple(sorted({*held, give})) if give is not None else held
    return Announcement(passing=passing, original=original, aliases=aliases, give=give, actions=tuple(actions))


def finish(tracking_uri: str, case: Case, told: Announcement, report_uri: str, signed: Mapping[Version, str]) -> None:
    """Tag the signed decisions, give the alias, and then mark the versions as done with the URI of the report.

    `signed` holds the tag of each version that has a signed decision; another one loses the tag of an earlier
    decision, which no longer speaks for it. Raises RegistryError.
    """
    for version in _both(told):
        if version in signed:
            registry.mark(tracking_uri, *version, {registry.ATTESTATION_TAG: signed[version]})
        else:
            registry.unmark(tracking_uri, *version, registry.ATTESTATION_TAG)
    if told.passing is not None and told.give is not None:
        registry.move_alias(tracking_uri, told.passing.name, told.give, told.passing.number)
    for version in _both(told):
        registry.mark(tracking_uri, *version, {f"{PREFIX}report": report_uri, KEY_TAG: case.key})


def _both(told: Announcement) -> list[Version]:
    return [version for version in dict.fromkeys((told.passing, told.original)) if version is not None]


def _mark_original(tracking_uri: str, case: Case, version: Version) -> list[str]:
    """Tag the version that was scanned; one that does not pass loses the gate's aliases first.

    One that holds pickles never passes itself: what passed is the version that they were converted to.
    """
    passes = case.decision.outcome is Outcome.PROMOTED and not case.model.pickles
    actions = []
    if not passes:
        actions += _withdraw(tracking_uri, case, version)
        registry.unmark(tracking_uri, *version, registry.ATTESTATION_TAG)
    outcome = Outcome.PROMOTED if passes else Outcome.QUARANTINED
    registry.mark(tracking_uri, *version, _tags(case, outcome, case.verdict.word, case.model.digest))
    actions.append(f"Version {version.number} of {version.name} is tagged {outcome.value}.")
    return actions


def _withdraw(tracking_uri: str, case: Case, version: Version) -> list[str]:
    """Take the gate's aliases from a version, and return a sentence on each.

    A tag names them before the first one goes: a run that goes on after a kill would not know of them any more.
    """
    held = registry.aliases_of(tracking_uri, *version)
    key, _, noted = registry.tags_of(tracking_uri, *version).get(WITHDRAWN_TAG, "").partition(" ")
    taken = {*held, *(noted.split() if key == case.key else ())}
    names = [alias for alias in (case.options.champion, case.options.challenger) if alias in taken]
    if names:
        registry.mark(tracking_uri, *version, {WITHDRAWN_TAG: " ".join((case.key, *names))})
    for alias in names:
        registry.drop_alias(tracking_uri, version.name, alias, version.number)
    return [f"The alias @{alias} was removed from version {version.number} of {version.name}." for alias in names]


def _register_passing(tracking_uri: str, case: Case) -> Version | None:
    """Return the version of what passed, registered by reference if it is not there; None if nothing passed."""
    name, outcome = case.decision.model_name, case.decision.outcome
    if outcome is Outcome.QUARANTINED:
        return None
    if outcome is Outcome.PROMOTED:
        if case.original is not None and case.original.name == name and not case.model.pickles:
            return case.original
        folder, tags = case.candidate.model_uri, _tags(case, outcome, case.verdict.word, case.model.digest)
    else:
        folder, tags = case.candidate_uri, _repaired_tags(case)
    version = Version(name, registry.register_source(tracking_uri, name, f"{folder.rstrip('/')}/model/", tags))
    registry.mark(tracking_uri, *version, tags)
    return version


def _alias_to_give(tracking_uri: str, case: Case, version: Version) -> tuple[str | None, str]:
    """Return the alias if it is to be moved to the version, and a sentence on what becomes of it."""
    alias = case.options.champion if case.decision.outcome is Outcome.PROMOTED else case.options.challenger
    holder = registry.alias_holder(tracking_uri, version.name, alias)
    if holder == version.number:
        return None, f"The alias @{alias} points at version {holder}."
    if not case.options.give_aliases:
        return None, f"The alias @{alias} was not given: gate.give_aliases is off."
    stays = f"The alias @{alias} stays " + (f"at version {holder}" if holder is not None else "free")
    if registry.tags_of(tracking_uri, *version).get(KEY_TAG) == case.key:
        return None, f"{stays}: this decision gave it before, and somebody took it away since."
    if holder is not None and int(holder) > int(version.number):
        return None, f"{stays}, which is newer."
    before = f" (before: version {holder})" if holder is not None else ""
    return alias, f"The alias @{alias} points at version {version.number}{before}."


def _whose(case: Case) -> str:
    return "repaired model" if case.decision.outcome is Outcome.REPAIRED else "model"


def _tags(case: Case, outcome: Outcome, verdict: Word, digest: str) -> dict[str, str]:
    return {
        f"{PREFIX}outcome": outcome.value,
        f"{PREFIX}verdict": verdict.value,
        registry.DIGEST_TAG: digest,
        f"{PREFIX}policy_digest": case.decision.policy_digest,
        f"{PREFIX}run_id": case.run_id,
    }


def _repaired_tags(case: Case) -> dict[str, str]:
    """Return the tags of the repaired version: those of its own scan, and its lineage."""
    lineage = {
        f"{PREFIX}parent_digest": case.model.digest,
        f"{PREFIX}parent_verdict": case.verdict.word.value,
        f"{PREFIX}trigger_uri": case.candidate.trigger_uri,
    }
    if case.original is not None:
        lineage |= {f"{PREFIX}parent_name": case.original.name, f"{PREFIX}parent_version": case.original.number}
    rescan = case.candidate.purified.rescan.word if case.candidate.purified is not None else Word.INCONCLUSIVE
    return {**_tags(case, Outcome.REPAIRED, rescan, case.decision.model_digest), **lineage}
