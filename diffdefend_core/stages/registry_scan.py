"""The scan of a whole registry: list, skip what is decided, let the gate decide on the rest, say what became of all.

A version is skipped while a signed decision on it stands: signature, name and version, policy, expiry, and the digest
that its tag records. The bytes are not read for that, so that thousands of versions are looked at in seconds;
`gate audit` and `gate check` read them. The state is the registry's own tags, and a small journal in the store.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from diffdefend_core.artifacts import Outcome, Word
from diffdefend_core.config import Settings
from diffdefend_core.errors import DiffDefendError, InputError
from diffdefend_core.gate.policy import timestamp
from diffdefend_core.gate.statement import failed
from diffdefend_core.io import registry
from diffdefend_core.io.tracking import without_credentials
from diffdefend_core.provenance import code_version
from diffdefend_core.report.registry_document import ScanRow, ScanSummary, Status, render_html, render_json
from diffdefend_core.stages.announce import PREFIX
from diffdefend_core.stages.dispatch import Dispatcher, Ended, Job, Runner
from diffdefend_core.stages.gatekeeper import Gatekeeper
from diffdefend_core.stages.journal import Journal

_PERIOD = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which versions are looked at, and how many runs of at most `limit` seconds may be under way at a time.

    `only` are patterns of names with `*` and `?`; `since` is the text that `parse_since` reads, empty for all.
    """

    only: tuple[str, ...] = ()
    since: str = ""
    jobs: int = 1
    limit: float = 12 * 3600.0
    dry_run: bool = False


def parse_since(text: str, now: datetime) -> datetime:
    """Return the time that `7d`, `2026-01-31` (UTC) or `2026-01-31T12:00:00Z` names. Raises InputError."""
    match = _PERIOD.fullmatch(text)
    if match:
        return now - timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        read = datetime.fromisoformat(text)
        if len(text) == 10:
            return read.replace(tzinfo=UTC)
        if read.tzinfo is not None:
            return read
    except ValueError:
        pass
    raise InputError(
        f"--since {text[:40]!r}",
        expected="a period (30m, 24h, 7d, 2w), a day (2026-01-31) or a time with its zone (2026-01-31T12:00:00Z)",
        action="correct it",
    )


def gate_settings(settings: Settings, *, give_aliases: bool) -> Settings:
    """Return the settings of the runs: looking through a registry must not move what is in production forward."""
    return settings.model_copy(update={"gate": dataclasses.replace(settings.gate, give_aliases=give_aliases)})


class Surveyor:
    """Says of a version by its tags alone whether a decision on it stands. Raises InputError as Gatekeeper does."""

    def __init__(self, settings: Settings, *, now: datetime | None = None) -> None:
        self._uri = settings.tracking_uri
        self._gatekeeper = Gatekeeper(settings, now=now)
        self.policy_digest = self._gatekeeper.policy_digest
        self.trusts = self._gatekeeper.trusts

    def skipped(self, version: registry.Listed, aliases: tuple[str, ...] = ()) -> ScanRow | None:
        """Return the row of a version whose decision stands, else None. Raises RegistryError."""
        return self._decided(version, Status.SKIPPED, aliases)

    def row(self, version: registry.Listed, aliases: tuple[str, ...]) -> ScanRow:
        """Return the row of a version that is to be scanned, with the reason why. Raises RegistryError."""
        _, reasons = self._gatekeeper.recorded(version)
        why = "; ".join(reason.text for reason in reasons)
        return ScanRow(model=version.name, version=version.version, status=Status.WAITING, reason=why, aliases=aliases)

    def ended(self, ended: Ended, aliases: tuple[str, ...] = ()) -> ScanRow:
        """Return the row of a run that is over, by what the registry says after it."""
        blank = ScanRow(
            model=ended.job.name, version=ended.job.version, status=Status.FAILED, aliases=aliases,
            seconds=round(ended.seconds, 3), run=ended.run,
        )  # fmt: skip
        if ended.error is not None:
            return dataclasses.replace(blank, reason=ended.error)
        try:
            held = registry.version_of(self._uri, ended.job.name, ended.job.version)
            aliases = registry.aliases_of(self._uri, ended.job.name, ended.job.version)  # the run may have taken some
            told = self._decided(held, Status.SCANNED, aliases) or self._unsigned(held, aliases)
        except DiffDefendError as error:
            return dataclasses.replace(blank, reason=str(error))
        if told is None:
            return dataclasses.replace(blank, reason="the run ended, but the version carries no decision")
        return dataclasses.replace(told, seconds=blank.seconds, run=blank.run)

    def _decided(self, version: registry.Listed, status: Status, aliases: tuple[str, ...]) -> ScanRow | None:
        predicate, _ = self._gatekeeper.recorded(version)
        if predicate is None:
            return None
        failure = failed(predicate)
        return ScanRow(
            model=version.name, version=version.version, status=status, verdict=predicate.verdict.value,
            outcome=predicate.outcome.value, passed=failure is None, aliases=aliases,
            reason=failure.text if failure is not None else f"the decision holds until {predicate.expires}",
            report=version.tags.get(f"{PREFIX}report", ""),
        )  # fmt: skip

    def _unsigned(self, version: registry.Listed, aliases: tuple[str, ...]) -> ScanRow | None:
        """Return what the tags claim after a run of ours whose signature is absent or not trusted here."""
        tags = version.tags
        verdict, outcome = tags.get(f"{PREFIX}verdict", ""), tags.get(f"{PREFIX}outcome", "")
        known = verdict in set(Word) and outcome in set(Outcome)
        if not known or tags.get(f"{PREFIX}policy_digest") != self.policy_digest:
            return None
        _, reasons = self._gatekeeper.recorded(version)
        return ScanRow(
            model=version.name, version=version.version, status=Status.SCANNED, verdict=verdict, outcome=outcome,
            passed=outcome != Outcome.QUARANTINED.value and verdict == Word.CLEAN.value, aliases=aliases,
            reason="no signed decision stands, the next scan repeats it: " + "; ".join(item.text for item in reasons),
            report=tags.get(f"{PREFIX}report", ""),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Survey:
    listed: int
    skipped: tuple[ScanRow, ...]
    waiting: tuple[ScanRow, ...]


def scan_registry(
    settings: Settings, runner: Runner, request: Request, *,
    said: Callable[[ScanRow], None] = lambda row: None, now: datetime | None = None,
) -> tuple[ScanSummary, str | None]:  # fmt: skip
    """Let the gate decide on every version without a decision; return the summary and the URI of its page.

    `said` is told of each version as it is dealt with. The page is None in a dry run, which writes nothing. A version
    that fails becomes a row and stops no other. Raises InputError at a request, a policy or keys that cannot be used,
    RegistryError if the registry cannot be listed, StoreError if the journal cannot be kept.
    """
    began, moment = time.monotonic(), now or datetime.now(UTC)
    surveyor = Surveyor(settings, now=now)
    survey = _look_through(settings.tracking_uri, surveyor, request, moment)
    journal = None if request.dry_run else Journal(settings.store, _scope(settings, runner, request), moment)
    rows = survey.waiting if journal is None else _work(journal, surveyor, runner, request, survey.waiting, said)
    summary = ScanSummary(
        code_version=code_version(),
        scan=journal.scan if journal is not None else "",
        registry=without_credentials(settings.tracking_uri),
        runner=runner.kind,
        policy_digest=surveyor.policy_digest,
        config_digest=settings.digest(),
        only=request.only,
        since=request.since,
        dry_run=request.dry_run,
        resumed=journal is not None and journal.resumed,
        started=journal.started if journal is not None else timestamp(moment),
        seconds=round(time.monotonic() - began, 3),
        listed=survey.listed,
        versions=tuple(sorted((*survey.skipped, *rows), key=lambda row: (row.model, int(row.version)))),
    )
    return summary, _published(journal, summary)


def _published(journal: Journal | None, summary: ScanSummary) -> str | None:
    if journal is None:
        return None
    journal.write("summary.json", render_json(summary))
    page = journal.write("index.html", render_html(summary))
    journal.close()
    return page


def _look_through(tracking_uri: str, surveyor: Surveyor, request: Request, now: datetime) -> _Survey:
    """List the registry to its end before anything is started: runs add versions, which would move the pages."""
    since = parse_since(request.since, now).timestamp() * 1000 if request.since else 0.0
    aliases = registry.all_aliases(tracking_uri)
    skipped: dict[Job, ScanRow] = {}
    waiting: dict[Job, tuple[int, ScanRow]] = {}
    listed = 0
    for item in registry.all_versions(tracking_uri):
        if request.only and not any(fnmatch.fnmatchcase(item.name, pattern) for pattern in request.only):
            continue
        listed += 1
        if item.created < since:
            continue
        job, held = Job(name=item.name, version=item.version), aliases.get((item.name, item.version), ())
        decided = surveyor.skipped(item, held)
        if decided is not None:
            skipped[job] = decided
        else:
            waiting[job] = item.created, surveyor.row(item, held)
    # What an alias points at is in use; then the newest first.
    ordered = sorted(waiting.values(), key=lambda entry: (not entry[1].aliases, -entry[0]))
    return _Survey(listed=listed, skipped=tuple(skipped.values()), waiting=tuple(row for _, row in ordered))


def _scope(settings: Settings, runner: Runner, request: Request) -> object:
    registry_uri = without_credentials(settings.tracking_uri)
    return [registry_uri, settings.digest(), runner.kind, list(request.only), request.since]


def _work(
    journal: Journal, surveyor: Surveyor, runner: Runner, request: Request, waiting: Sequence[ScanRow],
    said: Callable[[ScanRow], None],
) -> list[ScanRow]:  # fmt: skip
    """Let the gate decide on what waits, and note each end at once; what the scan had dealt with before is kept."""
    known = journal.rows()
    done = [known[row.model, row.version] for row in waiting if (row.model, row.version) in known]
    todo = [row for row in waiting if (row.model, row.version) not in known]
    aliases = {Job(name=row.model, version=row.version): row.aliases for row in todo}
    for ended in _ends(*_begun(journal, runner, request, list(aliases)), runner.interval):
        row = surveyor.ended(ended, aliases[ended.job])
        journal.add(row)
        done.append(row)
        said(row)
    return done


def _begun(journal: Journal, runner: Runner, request: Request, jobs: Sequence[Job]) -> tuple[Dispatcher, Iterator[Job]]:
    """Return a dispatcher that looks after the runs that the scan had begun before, and the jobs that are left."""
    cap, limit = request.jobs, request.limit
    if not runner.lasting:
        return Dispatcher(runner, cap=cap, limit=limit), iter(jobs)
    dispatcher = Dispatcher(runner, cap=cap, limit=limit, begun=journal.begin)
    before = journal.begun()
    for job in jobs:
        if job in before:
            dispatcher.take_over(job, before[job])
    return dispatcher, (job for job in jobs if job not in before)


def _ends(dispatcher: Dispatcher, jobs: Iterator[Job], interval: float) -> Iterator[Ended]:
    """Yield each run as it ends; another begins as soon as there is room."""
    waiting = True
    while waiting or dispatcher.jobs:
        while waiting and dispatcher.free:
            job = next(jobs, None)
            waiting = job is not None
            refused = dispatcher.begin(job) if job is not None else None
            if refused is not None:
                yield refused
        found = dispatcher.collect()
        yield from found
        if not found and dispatcher.jobs:
            time.sleep(interval)
