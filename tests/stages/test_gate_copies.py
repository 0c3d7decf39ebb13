"""`gate promote --to` copies what verifies, and a copy holds only by its own bytes and the decision on its origin.

All against a real MLflow on sqlite. Those who attack may write to the registry, here even to its database.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from signed_world import World

from diffdefend_core.artifacts import Word
from diffdefend_core.cli import run_command
from diffdefend_core.errors import InputError
from diffdefend_core.io import registry, tracking
from diffdefend_core.report.registry_document import Status
from diffdefend_core.stages import attestation, gatekeeper
from diffdefend_core.stages.gatekeeper import Check, Gatekeeper
from diffdefend_core.stages.registry_scan import Surveyor

pytestmark = pytest.mark.usefixtures("place_of_its_own")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registry; each test registers models of its own."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of a model that this test alone uses."""
    return f"m{zlib.crc32(request.node.name.encode())}"


@pytest.fixture
def said(world: World, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `diffdefend gate ...` and returns its exit code and what it said."""

    def run(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        code = run_command(["gate", *words, *world.flags()])
        out, err = capfd.readouterr()
        return code, out + err

    return run


def decided(world: World, name: str, **decision: Any) -> Path:
    """Register version 1 of a new model, let the gate decide on it, and return its folder."""
    folder = world.model(name)
    assert world.version(name, folder) == "1"
    world.decided(name, "1", **decision)
    return folder


def again(world: World, name: str, **decision: Any) -> str:
    """Let the gate decide on version 1 once more, after a scan of its own."""
    shutil.rmtree(world.place / "store" / f"{name}-1", ignore_errors=True)
    return world.decided(name, "1", **decision)


def copied(world: World, name: str, to: str = "") -> str:
    """Copy version 1 by hand, as anybody may who can write there, and return `models:/name/version`."""
    made = tracking.connect(world.uri).copy_model_version(f"models:/{name}/1", to or f"prod-{name}")
    return f"models:/{made.name}/{made.version}"


def check(world: World, source: str, now: datetime | None = None) -> Check:
    return Gatekeeper(world.settings, now=now).check(source)


def codes(answer: Check) -> set[str]:
    assert answer.holds == (not answer.reasons)
    return {reason.code for reason in answer.reasons}


def tag(world: World, name: str, version: str = "1") -> str:
    return registry.tags_of(world.uri, name, version)[registry.ATTESTATION_TAG]


def versions(world: World, name: str) -> list[int]:
    found = tracking.connect(world.uri).search_model_versions(f"name='{name}'")
    return sorted(int(version.version) for version in found)


def rewritten(world: World, name: str, **columns: str) -> None:
    """Change columns of version 1 in MLflow's database, which no call of MLflow does."""
    with sqlite3.connect(world.place / "mlflow.db") as database:
        for column, value in columns.items():
            database.execute(f"UPDATE model_versions SET {column} = ? WHERE name = ? AND version = 1", (value, name))


def anew(world: World, name: str, folder: Path) -> None:
    """Delete the registered model and register the folder as version 1 of the same name."""
    tracking.connect(world.uri).delete_registered_model(name)
    assert world.version(name, folder) == "1"


def test_mlflow_copies_by_reference_with_the_tags_and_keeps_the_place_of_the_bytes(world: World, name: str) -> None:
    """What the check of a copy rests on: the source names the origin, and the location is that of the moment."""
    folder = decided(world, name)
    client = tracking.connect(world.uri)
    copy = client.copy_model_version(f"models:/{name}/1", f"prod-{name}")
    assert (copy.source, copy.run_id) == (f"models:/{name}/1", None)
    assert dict(copy.tags) == registry.tags_of(world.uri, name, "1")
    assert registry.download_uri(world.uri, copy.name, "1") == folder.as_uri()
    anew(world, name, world.model(f"{name}-other"))
    assert registry.download_uri(world.uri, copy.name, "1") == folder.as_uri()


def test_promote_copies_once_and_the_copy_holds_by_the_decision_on_its_origin(
    world: World, name: str, said: Callable[..., Any]
) -> None:
    decided(world, name)
    for _ in range(2):
        code, out = said("promote", f"models:/{name}@champion", "--alias", "champion", "--to", f"prod-{name}")
        assert (code, out) == (0, f"yes  @champion points at models:/prod-{name}/1, a copy of models:/{name}/1\n")
    assert versions(world, f"prod-{name}") == [1]
    code, out = said("check", f"models:/prod-{name}@champion")
    whole = f"models:/prod-{name}@champion (models:/prod-{name}/1, a copy of models:/{name}/1)"
    assert code == 0 and out.startswith(f"yes  {whole}: the decision holds until")
    code, out = said("audit", "--only", f"prod-{name}", "-o", "json")
    assert (code, [row["state"] for row in json.loads(out)]) == (0, ["ok"])
    code, out = said("promote", f"models:/{name}/1", "--alias", "b", "--to", f"prod-{name}", "-o", "json")
    told = json.loads(out)
    assert (told["moved"], told["version"], told["copy_of"]) == (True, f"models:/prod-{name}/1", f"models:/{name}/1")


def test_promote_copies_nothing_that_does_not_verify(world: World, name: str, said: Callable[..., Any]) -> None:
    decided(world, name, word=Word.INCONCLUSIVE)
    code, out = said("promote", f"models:/{name}/1", "--alias", "champion", "--to", f"prod-{name}")
    assert code == 1 and "the decision is FAILED" in out
    assert f"prod-{name}" not in registry.model_names(world.uri)


def test_a_destination_that_cannot_be_is_one_clear_line(world: World, name: str, said: Callable[..., Any]) -> None:
    decided(world, name)
    for to, words in ((name, "is the model itself"), ("a/b", "give another name (--to)")):
        code, out = said("promote", f"models:/{name}/1", "--alias", "champion", "--to", to)
        assert code == 2 and words in out and out.count("\n") == 1
    with pytest.raises(InputError):
        Gatekeeper(world.settings).promote(f"models:/{name}/1", "champion", to="")


def test_the_environments_form_a_chain(world: World, name: str, said: Callable[..., Any]) -> None:
    decided(world, name)
    assert said("promote", f"models:/{name}/1", "--alias", "candidate", "--to", f"stage-{name}")[0] == 0
    code, out = said("promote", f"models:/stage-{name}@candidate", "--alias", "champion", "--to", f"prod-{name}")
    assert code == 0 and out.endswith(f"models:/prod-{name}/1, a copy of models:/{name}/1\n")
    assert registry.version_of(world.uri, f"prod-{name}", "1").source == f"models:/stage-{name}/1"


def test_two_that_promote_at_once_leave_one_copy(world: World, name: str) -> None:
    decided(world, name)
    registry.register_source(world.uri, f"prod-{name}", "s3://bucket/other/", {registry.DIGEST_TAG: "other"})
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: registry.copy_version(world.uri, name, "1", f"prod-{name}"), range(2)))
    assert made[0][0] == made[1][0] and len(versions(world, f"prod-{name}")) == 2


def test_the_last_of_two_copies_takes_its_own_back(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process copies between the look and the copying, which are two calls."""
    decided(world, name)
    look, looks = registry._copy_in, []

    def late(*arguments: Any) -> str | None:
        looks.append(arguments)
        if len(looks) == 1:
            copied(world, name)
            return None
        return look(*arguments)

    monkeypatch.setattr(registry, "_copy_in", late)
    assert registry.copy_version(world.uri, name, "1", f"prod-{name}") == ("1", False)
    assert versions(world, f"prod-{name}") == [1]


@pytest.mark.parametrize("before", [None, "1"])
def test_promote_takes_the_alias_back_when_the_bytes_change_meanwhile(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    folder, to = decided(world, name), f"prod-{name}"
    registry.register_source(world.uri, to, "s3://bucket/older/", {registry.DIGEST_TAG: "older"})
    move = registry.move_alias
    if before is not None:
        move(world.uri, to, "champion", before)

    def move_and_change(*given: str) -> None:
        move(*given)
        (folder / "NOTE.txt").write_text("swapped")

    monkeypatch.setattr(registry, "move_alias", move_and_change)
    answer, moved = Gatekeeper(world.settings).promote(f"models:/{name}/1", "champion", to=to)
    assert not moved and codes(answer) == {"changed-bytes"} and answer.version == f"models:/{to}/2"
    assert registry.alias_holder(world.uri, to, "champion") == before


def test_a_flipped_byte_of_a_copy_is_no(world: World, name: str) -> None:
    folder = decided(world, name)
    source = copied(world, name)
    assert check(world, source).holds
    (folder / "NOTE.txt").write_text("swapped")
    assert codes(check(world, source)) == {"changed-bytes"}


def test_what_becomes_of_the_decision_on_the_origin_holds_for_the_copy(world: World, name: str) -> None:
    """The copy still carries the tag that passed; only the origin shows that the gate decided anew."""
    decided(world, name, valid_days=10)
    source, later = copied(world, name), datetime.now(UTC) + timedelta(days=11)
    brought = tag(world, f"prod-{name}")
    assert codes(check(world, source, later)) == {"expired"}
    again(world, name, now=datetime.now(UTC) + timedelta(days=9), valid_days=10)
    assert check(world, source, later).holds
    again(world, name, word=Word.INCONCLUSIVE)
    assert tag(world, f"prod-{name}") == brought
    assert codes(check(world, source)) == {"failed"}
    registry.unmark(world.uri, name, "1", registry.ATTESTATION_TAG)
    assert codes(check(world, source)) == {"unsigned"}


def test_a_decision_of_its_own_goes_before_that_on_the_origin(world: World, name: str) -> None:
    decided(world, name)
    source = copied(world, name)
    world.decided(f"prod-{name}", "1")
    own = check(world, source)
    assert own.holds and own.origin is None
    tracking.connect(world.uri).delete_model_version(name, "1")
    assert check(world, source).holds, "it stands on its own now"


def test_promote_gives_no_alias_to_a_copy_that_the_gate_decided_against(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(world, name)
    source = copied(world, name)
    again(world, f"prod-{name}", word=Word.INCONCLUSIVE)
    moves: list[tuple[str, ...]] = []
    monkeypatch.setattr(registry, "move_alias", lambda *given: moves.append(given))
    answer, moved = Gatekeeper(world.settings).promote(f"models:/{name}/1", "champion", to=f"prod-{name}")
    assert (moved, answer.version, codes(answer)) == (False, source, {"failed"})
    assert moves == [], "not even for a moment"


def test_a_decision_pasted_onto_another_version_is_no(world: World, name: str) -> None:
    """Same bytes, same tags, but registered by hand: nothing says that it is a copy."""
    folder = decided(world, name)
    pasted = registry.register_source(world.uri, f"prod-{name}", folder.as_uri(), {registry.DIGEST_TAG: "x"})
    registry.mark(world.uri, f"prod-{name}", pasted, registry.tags_of(world.uri, name, "1"))
    assert codes(check(world, f"models:/prod-{name}/{pasted}")) == {"other-subject"}


def test_a_decision_pasted_onto_a_copy_of_another_model_is_no(world: World, name: str) -> None:
    decided(world, name)
    evil = world.model(f"evil-{name}")
    world.version(f"evil-{name}", evil)
    source = copied(world, f"evil-{name}", to=f"prod-{name}")
    registry.mark(world.uri, f"prod-{name}", "1", registry.tags_of(world.uri, name, "1"))
    answer = check(world, source)
    assert codes(answer) == {"unsigned"} and answer.origin == f"models:/evil-{name}/1"
    registry.mark(world.uri, f"evil-{name}", "1", {registry.ATTESTATION_TAG: tag(world, name)})
    assert codes(check(world, source)) == {"other-subject", "changed-bytes"}


def test_a_copy_whose_origin_is_gone_is_no(world: World, name: str, said: Callable[..., Any]) -> None:
    """Deleting the origin must not save a copy from a decision against it: its own tag is of the day of the copy."""
    decided(world, name)
    source = copied(world, name)
    tracking.connect(world.uri).delete_model_version(name, "1")
    code, out = said("check", source)
    assert (code, out) == (
        1,
        f"no   {source}: it is a copy, and models:/{name}/1 is not there any more, or not to be read\n",
    )
    registry.move_alias(world.uri, f"prod-{name}", "champion", "1")
    code, out = said("audit", "--only", f"prod-{name}", "-o", "json")
    assert (code, [row["state"] for row in json.loads(out)]) == (1, ["untrusted"])


def test_a_copy_of_bad_bytes_whose_origin_was_registered_anew_with_good_ones_is_no(world: World, name: str) -> None:
    world.version(name, world.model(f"evil-{name}"))
    source = copied(world, name)
    anew(world, name, world.model(name))
    world.decided(name, "1")
    answer = check(world, source)
    assert codes(answer) == {"no-origin"} and "is another model by now" in answer.reasons[0].text
    _, reasons = Gatekeeper(world.settings).recorded(registry.version_of(world.uri, f"prod-{name}", "1"))
    assert [reason.code for reason in reasons] == ["no-origin"], "it shows without the bytes too"


def test_after_the_origin_was_registered_anew_promote_makes_a_new_copy(world: World, name: str) -> None:
    world.version(name, world.model(f"evil-{name}"))
    copied(world, name)
    anew(world, name, world.model(name))
    world.decided(name, "1")
    answer, moved = Gatekeeper(world.settings).promote(f"models:/{name}/1", "champion", to=f"prod-{name}")
    assert moved and answer.version == f"models:/prod-{name}/2"


def test_a_source_that_was_retargeted_in_the_database_is_no(world: World, name: str) -> None:
    decided(world, name)
    evil = world.model(f"evil-{name}")
    registry.register_source(world.uri, f"prod-{name}", evil.as_uri(), registry.tags_of(world.uri, name, "1"))
    rewritten(world, f"prod-{name}", source=f"models:/{name}/1")
    assert codes(check(world, f"models:/prod-{name}/1")) == {"no-origin"}


def test_even_where_the_registry_lies_about_source_and_place_the_bytes_decide(world: World, name: str) -> None:
    """Origin and copy are moved to the same bad bytes: what is left is the digest, and it is signed."""
    decided(world, name)
    source, evil = copied(world, name), world.model(f"evil-{name}").as_uri()
    for held in (name, f"prod-{name}"):
        rewritten(world, held, storage_location=evil)
    assert codes(check(world, source)) == {"changed-bytes"}


def test_copies_in_a_ring_end_and_are_no(world: World, name: str) -> None:
    """A name that is deleted and registered anew as a copy of its own copy."""
    client = tracking.connect(world.uri)
    decided(world, name)
    source = copied(world, name)
    client.delete_registered_model(name)
    client.create_registered_model(name)
    client.create_model_version(name, source)
    answer = check(world, source)
    assert codes(answer) == {"no-origin"} and "more than 8 times" in answer.reasons[0].text


def test_copies_of_copies_are_followed_so_far_and_no_further(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(world, name)
    chain = [f"models:/{name}/1"]
    for number in range(3):
        made = tracking.connect(world.uri).copy_model_version(chain[-1], f"{name}-{number}")
        chain.append(f"models:/{made.name}/1")
    assert check(world, chain[3]).origin == chain[0]
    monkeypatch.setattr(gatekeeper, "DEEPEST", 2)
    assert check(world, chain[2]).holds and codes(check(world, chain[3])) == {"no-origin"}


def test_a_named_decision_must_be_about_the_version_itself(world: World, name: str, said: Callable[..., Any]) -> None:
    decided(world, name)
    uri = again(world, name)
    source = copied(world, name)
    code, out = said("check", source, "--decision", f"{uri}{attestation.FILE}")
    assert code == 1 and f"the decision is about models:/{name}/1, not about {source}" in out


def test_the_scan_skips_a_copy_and_the_gauge_counts_it_as_decided(world: World, name: str) -> None:
    """Else each promotion would cost a second scan of the same bytes, and raise the alarm until then."""
    decided(world, name)
    copied(world, name)
    alias = f"only-{name}"
    registry.move_alias(world.uri, f"prod-{name}", alias, "1")
    surveyor, keeper = Surveyor(world.settings), Gatekeeper(world.settings)
    row = surveyor.skipped(registry.version_of(world.uri, f"prod-{name}", "1"))
    assert row is not None and (row.status, row.passed) == (Status.SKIPPED, True)
    assert keeper.undecided(alias) == 0
    again(world, name, word=Word.INCONCLUSIVE)
    row = surveyor.skipped(registry.version_of(world.uri, f"prod-{name}", "1"))
    assert row is not None and row.blocked
    assert keeper.undecided(alias) == 1
