"""The scan of a registry, against a real MLflow on sqlite; a runner that signs plays the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.signed_versions import decided_tags
from diffdefend_core.artifacts import Word
from diffdefend_core.cli.registry import _code
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError
from diffdefend_core.gate.signing import read_signer
from diffdefend_core.io import registry
from diffdefend_core.options import SigningOptions
from diffdefend_core.report.registry_document import ScanRow, ScanSummary, Status, render_html
from diffdefend_core.stages.dispatch import Job
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.registry_scan import Request, parse_since, scan_registry

NAMES = ("bad", "broken", "done", "fresh", "<b>x")


class Decider:
    """Plays the gate: decides by the name of the model, signs, and is over at the second look."""

    kind, lasting, interval = "played", False, 0.0

    def __init__(self, settings: Settings, signer: object) -> None:
        self._uri, self._signer = settings.tracking_uri, signer
        self.begun: list[Job] = []
        self.looks: dict[str, int] = {}
        self.most = 0

    def begin(self, job: Job) -> str:
        self.begun.append(job)
        self.looks[job.uri] = 0
        self.most = max(self.most, len(self.looks))
        return job.uri

    def outcome(self, run: str) -> str | None:
        self.looks[run] += 1
        if self.looks[run] < 2:
            return None
        del self.looks[run]
        name, version = run.removeprefix("models:/").split("/")
        if name == "broken":
            return "its weights are no safetensors"
        word = Word.BACKDOORED if name == "bad" else Word.CLEAN
        registry.mark(self._uri, name, version, decided_tags(self._signer, run, word=word))
        return ""

    def stop(self, run: str) -> None:
        del self.looks[run]


class Lasting(Decider):
    """Plays a cluster: what a run came to can be asked at any time, by any controller."""

    lasting = True

    def __init__(self, settings: Settings, signer: object) -> None:
        super().__init__(settings, signer)
        self.ended: dict[str, str | None] = {}

    def outcome(self, run: str) -> str | None:
        if self.ended.get(run) is None:
            self.ended[run] = super().outcome(run)
        return self.ended[run]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A registry of five models of one version each, `done` decided, and the signer."""
    place = tmp_path_factory.mktemp("registry")
    key = write_key(place / "keys")
    signer = read_signer(Path(key["private_file"]).read_bytes(), "test")
    uri = f"sqlite:///{place}/mlflow.db"
    for name in NAMES:
        registry.register_source(uri, name, f"s3://models/{name}", {registry.DIGEST_TAG: "unknown"})
    registry.mark(uri, "done", "1", decided_tags(signer, "models:/done/1"))
    registry.move_alias(uri, "fresh", "champion", "1")
    return place, signer


@pytest.fixture
def world(template: tuple[Path, object], tmp_path: Path) -> Iterator[tuple[Settings, object]]:
    place, signer = template
    (tmp_path / "mlflow.db").write_bytes((place / "mlflow.db").read_bytes())
    yield Settings(
        store=f"file://{tmp_path}/store", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        signing=SigningOptions(trusted_keys=str(place / "keys")),
    ), signer  # fmt: skip


def scanned(world: tuple[Settings, object], **request: Any) -> tuple[ScanSummary, Decider]:
    runner = Decider(*world)
    return scan_registry(world[0], runner, Request(**request))[0], runner


def by_name(summary: ScanSummary) -> dict[str, ScanRow]:
    return {row.model: row for row in summary.versions}


def test_a_broken_model_stops_no_other_and_a_second_scan_repeats_only_it(world: tuple[Settings, object]) -> None:
    first, runner = scanned(world, jobs=2)
    assert runner.begun[0].name == "fresh", "what an alias points at comes first"
    assert runner.most == 2
    rows = by_name(first)
    assert {name: row.status for name, row in rows.items()} == {
        "bad": "scanned", "broken": "failed", "done": "skipped", "fresh": "scanned", "<b>x": "scanned",
    }  # fmt: skip
    assert rows["broken"].reason == "its weights are no safetensors"
    assert (rows["bad"].blocked, rows["fresh"].blocked, rows["fresh"].aliases) == (True, False, ("champion",))
    assert _code(first) == 2
    second, again = scanned(world)
    assert [job.name for job in again.begun] == ["broken"]
    assert by_name(second)["bad"].status is Status.SKIPPED and by_name(second)["bad"].blocked
    third, _ = scanned(world, only=("bad",))
    fourth, _ = scanned(world, only=("fre*", "done"))
    fifth, _ = scanned(world, only=("mistyped",))
    assert (_code(third), _code(fourth), _code(fifth)) == (1, 0, 3)


def test_a_dry_run_starts_and_writes_nothing(world: tuple[Settings, object], tmp_path: Path) -> None:
    summary, runner = scanned(world, dry_run=True)
    assert not runner.begun and not (tmp_path / "store").exists()
    assert {row.model for row in summary.versions if row.status is Status.WAITING} == {"bad", "broken", "fresh", "<b>x"}
    assert by_name(summary)["fresh"].reason == "the version carries no signed decision"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_crash_in_the_middle_loses_and_repeats_nothing(world: tuple[Settings, object], after: int) -> None:
    runner, told = Decider(*world), []

    def crash(row: ScanRow) -> None:
        told.append(row.model)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_registry(world[0], runner, Request(), said=crash)
    summary, again = scanned(world)
    assert summary.resumed
    begun = [job.name for job in runner.begun] + [job.name for job in again.begun]
    assert sorted(begun) == sorted(set(NAMES) - {"done"}), "each was run once, the broken one too"
    assert {row.model for row in summary.versions} == set(NAMES)
    assert by_name(summary)["broken"].status is Status.FAILED


@pytest.mark.parametrize("after", [1, 2, 3])
def test_runs_that_outlive_a_crash_are_looked_after_and_not_begun_again(
    world: tuple[Settings, object], after: int
) -> None:
    cluster, told = Lasting(*world), []

    def crash(row: ScanRow) -> None:
        told.append(row.model)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_registry(world[0], cluster, Request(jobs=2), said=crash)
    registry.register_source(world[0].tracking_uri, "newest", "s3://models/newest", {registry.DIGEST_TAG: "unknown"})
    summary, _ = scan_registry(world[0], cluster, Request(jobs=2))
    assert sorted(job.name for job in cluster.begun) == sorted({*NAMES, "newest"} - {"done"}) and cluster.most == 2
    assert by_name(summary)["broken"].reason == "its weights are no safetensors"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda signer: decided_tags(signer, "models:/fresh/1"), "is about models:/fresh/1"),
        (lambda signer: decided_tags(signer, "models:/done/1", days=-1), "expired"),
        (lambda signer: decided_tags(signer, "models:/done/1", policy="0" * 64), "the current one is"),
        (lambda signer: {registry.DIGEST_TAG: "f" * 64}, "the tag names the digest"),
        (lambda signer: {registry.ATTESTATION_TAG: "{}"}, "damaged"),
    ],
)
def test_a_decision_that_does_not_stand_is_made_again(
    world: tuple[Settings, object], change: Callable[[object], dict[str, str]], reason: str
) -> None:
    registry.mark(world[0].tracking_uri, "done", "1", change(world[1]))
    summary, _ = scanned(world, only=("done",), dry_run=True)
    assert summary.versions[0].status is Status.WAITING and reason in summary.versions[0].reason


def test_without_a_trusted_key_no_decision_stands(world: tuple[Settings, object]) -> None:
    settings = world[0].model_copy(update={"signing": SigningOptions()})
    summary, _ = scanned((settings, world[1]), only=("done",))
    assert summary.versions[0].status is Status.SCANNED and "no trusted key" in summary.versions[0].reason


def test_since_is_the_time_of_registration(world: tuple[Settings, object]) -> None:
    assert len(scanned(world, since="1h", dry_run=True)[0].versions) == len(NAMES)
    late, _ = scanned(world, since="2999-01-01", dry_run=True)
    assert (late.versions, late.listed, _code(late)) == ((), len(NAMES), 0)
    now = datetime(2026, 3, 2, tzinfo=UTC)
    assert parse_since("1d", now) == datetime(2026, 3, 1, tzinfo=UTC) == parse_since("2026-03-01", now)
    for wrong in ("", "0d", "yesterday", "2026-03-01T10:00:00", "99999999999d"):
        with pytest.raises(InputError):
            parse_since(wrong, now)


def test_a_run_that_takes_too_long_is_stopped(world: tuple[Settings, object]) -> None:
    summary, runner = scanned(world, only=("fresh",), limit=-1.0)
    assert "stopped" in summary.versions[0].reason and not runner.looks


def test_the_page_escapes_names_and_allows_its_own_script_alone(world: tuple[Settings, object]) -> None:
    import base64
    import hashlib

    page = render_html(scanned(world, dry_run=True)[0])
    assert "&lt;b&gt;x" in page and "<b>x" not in page and "://" not in page.replace("sqlite://", "")
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_the_summary_is_in_the_store(world: tuple[Settings, object]) -> None:
    _, page = scan_registry(world[0], Decider(*world), Request())
    assert page is not None
    folder = Path(page.removeprefix("file://")).parent
    document = json.loads((folder / "summary.json").read_text())
    assert document["counts"] == {"skipped": 1, "scanned": 3, "failed": 1, "waiting": 0, "blocked": 1}
