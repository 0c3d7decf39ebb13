"""`gate check` believes the bytes and a trusted signature, and nothing that the registry says."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from signed_world import World

from diffdefend_core.artifacts import GateDecision, Word
from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError
from diffdefend_core.gate import signing
from diffdefend_core.gate.statement import Statement
from diffdefend_core.io import folders, registry
from diffdefend_core.options import GateOptions, SigningOptions
from diffdefend_core.stages import attestation
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.gatekeeper import Check, Gatekeeper
from diffdefend_core.stages.keys import write_key

NAME = "faces"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("place_of_its_own")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registry whose model `faces` has version 1, signed and the champion, and version 2, never scanned."""
    made = World(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as clean:
        clean.delenv("MLFLOW_RUN_ID", raising=False)
        clean.delenv(attestation.KEY_VARIABLE, raising=False)
        for number in ("1", "2"):
            assert made.version(NAME, made.model(f"{NAME}-{number}")) == number
        made.gate_uri = made.decided(NAME, "1")  # type: ignore[attr-defined]
    return made


@pytest.fixture
def said(world: World, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `diffdefend gate check` and returns its exit code and what it said."""

    def run(source: str, *more: str, **signing_flags: str) -> tuple[int, str]:
        code = run_command(["gate", "check", source, *world.flags(**signing_flags), *more])
        out, err = capfd.readouterr()
        assert err == ""
        return code, out

    return run


def tag(world: World, version: str = "1", name: str = NAME) -> str:
    return registry.tags_of(world.uri, name, version).get(registry.ATTESTATION_TAG, "")


@contextmanager
def tagged(world: World, version: str, text: str) -> Iterator[None]:
    """Put another text into the tag of a version for a while, as anybody with write access could."""
    before = tag(world, version)
    registry.mark(world.uri, NAME, version, {registry.ATTESTATION_TAG: text})
    yield
    if before:
        registry.mark(world.uri, NAME, version, {registry.ATTESTATION_TAG: before})
    else:
        registry.unmark(world.uri, NAME, version, registry.ATTESTATION_TAG)


def check(world: World, source: str, now: datetime | None = None, **changes: Any) -> Check:
    settings = world.settings.model_copy(update=changes)
    return Gatekeeper(settings, now=now).check(source)


def codes(answer: Check) -> set[str]:
    assert answer.holds == (not answer.reasons)
    return {reason.code for reason in answer.reasons}


def test_a_signed_version_holds_by_its_number_and_by_its_alias(world: World, said: Callable[..., Any]) -> None:
    for source in (f"models:/{NAME}/1", f"models:/{NAME}@champion"):
        code, out = said(source)
        assert (code, out.count("\n")) == (0, 1)
        assert out.startswith(f"yes  {source}")


def test_the_statement_says_what_was_decided_by_what(world: World) -> None:
    decision = read_record(GateDecision, world.gate_uri, "gate_decision")  # type: ignore[attr-defined]
    envelope = json.loads(tag(world))
    document = json.loads(base64.b64decode(envelope["payload"]))
    weights = folders.digest_files(world.place / "models" / f"{NAME}-1")
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["subject"][0] == {
        "name": WEIGHTS, "digest": {"sha256": next(item.sha256 for item in weights if item.path == WEIGHTS)},
    }  # fmt: skip
    assert document["subject"][1]["name"] == f"models:/{NAME}/1"
    predicate = document["predicate"]
    assert (predicate["model_digest"], predicate["policy_digest"]) == (decision.model_digest, decision.policy_digest)
    assert (predicate["result"], predicate["verdict"], predicate["probability"]) == ("PASSED", "clean", 0.021)
    assert predicate["calibration_digest"] == "d" * 64 and predicate["code_version"]
    assert tag(world) == folders.read_file(world.gate_uri, attestation.FILE).decode()  # type: ignore[attr-defined]


def test_the_signature_is_one_that_the_bare_library_verifies(world: World) -> None:
    """Ed25519 over the pre-authentication encoding of DSSE, computed by hand."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    envelope = json.loads(tag(world))
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    key = load_pem_public_key(world.key["public_key"].encode())
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded)  # type: ignore[union-attr, call-arg]
    assert envelope["signatures"][0]["keyid"] == world.key["key_id"]


@pytest.mark.parametrize("name", [WEIGHTS, "scheduler/scheduler_config.json"])
def test_a_flipped_byte_is_no(world: World, said: Callable[..., Any], name: str) -> None:
    path = world.place / "models" / f"{NAME}-1" / name
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    code, out = said(f"models:/{NAME}/1")
    path.write_bytes(before)
    assert code == 1
    assert "signed was" in out and ("the files have the digest" in out)
    assert (f"{name} has the sha256" in out) == (name == WEIGHTS)
    assert said(f"models:/{NAME}/1")[0] == 0


def test_an_added_file_and_a_missing_one_are_no(world: World) -> None:
    folder = world.place / "models" / f"{NAME}-1"
    (folder / "MORE.txt").write_text("x")
    assert codes(check(world, f"models:/{NAME}/1")) == {"changed-bytes"}
    (folder / "MORE.txt").unlink()
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    assert codes(check(world, f"models:/{NAME}/1")) == {"changed-bytes"}
    (folder / WEIGHTS).write_bytes(weights)
    assert check(world, f"models:/{NAME}/1").holds


def test_a_moved_alias_is_no(world: World, said: Callable[..., Any]) -> None:
    registry.move_alias(world.uri, NAME, "champion", "2")
    code, out = said(f"models:/{NAME}@champion")
    registry.move_alias(world.uri, NAME, "champion", "1")
    assert code == 1
    assert out == f"no   models:/{NAME}@champion (models:/{NAME}/2): the version carries no signed decision\n"


def test_a_decision_copied_to_another_version_is_no(world: World, said: Callable[..., Any]) -> None:
    with tagged(world, "2", tag(world)):
        code, out = said(f"models:/{NAME}/2")
    assert code == 1
    assert f"the decision is about models:/{NAME}/1, not about models:/{NAME}/2" in out
    assert "the files have the digest" in out


def test_a_decision_copied_to_another_name_with_the_same_bytes_is_no(world: World) -> None:
    copied = world.version("other", world.place / "models" / f"{NAME}-1")
    registry.mark(world.uri, "other", copied, {registry.ATTESTATION_TAG: tag(world)})
    assert codes(check(world, f"models:/other/{copied}")) == {"other-subject"}


def test_an_old_policy_is_no(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("version: 1\nrules: []\n")
    code, out = said(f"models:/{NAME}/1", "--set", "gate.policy=new.yaml")
    assert code == 1
    assert "it was decided by the policy" in out and out.count("\n") == 1


def test_an_expired_decision_is_no(world: World) -> None:
    now = datetime.now(UTC)
    assert check(world, f"models:/{NAME}/1", now + timedelta(days=89)).holds
    assert codes(check(world, f"models:/{NAME}/1", now + timedelta(days=91))) == {"expired"}


def test_an_expired_decision_exits_1_and_a_new_one_renews_it(world: World, said: Callable[..., Any]) -> None:
    version = world.version("renewed", world.model("renewed"))
    world.decided("renewed", version, now=datetime.now(UTC) - timedelta(days=2), valid_days=1)
    code, out = said(f"models:/renewed/{version}")
    assert code == 1 and "expired on" in out
    world.decided("renewed", version, valid_days=1)
    assert said(f"models:/renewed/{version}")[0] == 0


def waiving(digest: str, expires: str) -> dict[str, Any]:
    """Return a policy that the model fails, and a waiver for it."""
    rule = {"id": "fid", "metric": "scorecard.before.fid", "direction": "at_most", "threshold": 1.0}
    waiver = {"rule": "fid", "model_digest": digest, "statement": "Accepted for the pilot.", "owner": "ann",
              "expires": expires}  # fmt: skip
    return {"version": 1, "rules": [rule], "waivers": [waiver]}


def test_an_expired_waiver_is_no(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    folder = world.model("waived")
    version = world.version("waived", folder)
    digest = folders.content_digest(folders.digest_files(folder))
    policy = waiving(digest, "2026-02-01")
    world.decided("waived", version, policy=policy, now=datetime(2026, 1, 1, tzinfo=UTC), valid_days=3650)
    (tmp_path / "p.json").write_text(json.dumps(policy))
    code, out = said(f"models:/waived/{version}", "--set", "gate.policy=p.json")
    assert code == 1
    assert "the waiver of ann for the rule fid expired on 2026-02-01T23:59:59Z" in out and out.count("\n") == 1
    january = datetime(2026, 1, 20, tzinfo=UTC)
    assert check(world, f"models:/waived/{version}", january, gate=GateOptions(policy=policy)).holds
    withdrawn = GateOptions(policy={**policy, "waivers": []})
    assert codes(check(world, f"models:/waived/{version}", january, gate=withdrawn)) == {"waiver-withdrawn"}


def test_an_unknown_key_is_no(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    write_key(tmp_path / "other")
    code, out = said(f"models:/{NAME}/1", trusted_keys=str(tmp_path / "other"))
    assert code == 1 and "which is not among the trusted keys" in out


def test_without_a_trusted_key_it_is_no(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, out = said(f"models:/{NAME}/1", trusted_keys=str(tmp_path / "empty"))
    assert code == 1 and "no trusted key is configured" in out


def test_after_a_rotation_both_keys_are_trusted(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    write_key(tmp_path / "new")
    both = json.dumps([str(tmp_path / "new"), world.key["public_file"]])
    assert said(f"models:/{NAME}/1", trusted_keys=both)[0] == 0


def test_a_revoked_key_is_no(world: World, said: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "revoked").write_text(f"# stolen with the laptop\n{world.key['key_id']}  # ann\n\n")
    code, out = said(f"models:/{NAME}/1", revoked_keys=str(tmp_path / "revoked"))
    assert code == 1 and "which is revoked" in out


@pytest.mark.parametrize("text", ["abc\n", f"{'a' * 63}\n", f"{'A' * 64}\n"])
def test_a_line_that_revokes_nothing_is_an_error(world: World, text: str, tmp_path: Path) -> None:
    (tmp_path / "revoked").write_text(text)
    given = SigningOptions(trusted_keys=str(world.place / "keys"), revoked_keys=str(tmp_path / "revoked"))
    with pytest.raises(InputError, match="line 1"):
        Gatekeeper(world.settings.model_copy(update={"signing": given}))


def test_a_revocation_file_that_is_not_there_is_an_error(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["gate", "check", f"models:/{NAME}/1", *world.flags(revoked_keys="gone")]) == 2
    assert "signing.revoked_keys: gone cannot be read" in capfd.readouterr().err


def altered(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    envelope = json.loads(text)
    document = json.loads(base64.b64decode(envelope["payload"]))
    change(document)
    envelope["payload"] = base64.b64encode(json.dumps(document).encode()).decode()
    return json.dumps(envelope)


def test_a_tampered_envelope_is_no(world: World, said: Callable[..., Any]) -> None:
    later = altered(tag(world), lambda document: document["predicate"].update(expires="2099-01-01T00:00:00Z"))
    with tagged(world, "1", later):
        code, out = said(f"models:/{NAME}/1")
    assert code == 1 and "does not fit: the decision was changed" in out


@pytest.mark.parametrize("kept", [1, 300, -1, -40])
def test_a_truncated_tag_is_no(world: World, said: Callable[..., Any], kept: int) -> None:
    with tagged(world, "1", tag(world)[:kept]):
        code, out = said(f"models:/{NAME}/1")
    assert code == 1 and "damaged or cut off" in out


@pytest.mark.parametrize(
    "text",
    ["null", "{}", "[]", '{"payload": 1}', "sha256:00 file:///x", '{"payload":"","payloadType":"x","signatures":[]}',
     '{"payload":"e30=","payloadType":"text/plain","signatures":[{"keyid":"a","sig":"aa=="}]}',
     '{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[7]}', "[" * 5000],
)  # fmt: skip
def test_a_tag_of_anything_else_is_no(world: World, text: str) -> None:
    with tagged(world, "1", text):
        assert codes(check(world, f"models:/{NAME}/1")) == {"unreadable"}


def test_a_long_decision_is_named_in_the_tag_and_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch, said: Callable[..., Any]
) -> None:
    version = world.version("long", world.model("long"))
    monkeypatch.setattr(attestation, "MAX_TAG", 500)
    uri = world.decided("long", version)
    text = tag(world, version, "long")
    assert text.startswith("sha256:") and text.endswith(f" {uri}{attestation.FILE}")
    assert said(f"models:/long/{version}")[0] == 0
    path = Path(f"{uri}{attestation.FILE}".removeprefix("file://"))
    path.write_text(tag(world))
    code, out = said(f"models:/long/{version}")
    assert code == 1 and "is not the one that the tag names" in out
    path.unlink()
    assert codes(check(world, f"models:/long/{version}")) == {"unreadable"}


def test_a_signed_payload_that_is_no_decision_of_ours_is_no(world: World) -> None:
    signer = signing.read_signer(Path(world.key["private_file"]).read_bytes(), "key")
    statement = json.loads(base64.b64decode(json.loads(tag(world))["payload"]))
    for payload in (b"7", b"{}", b"[", json.dumps({**statement, "predicateType": "other"}).encode(),
                    json.dumps({**statement, "subject": []}).encode()):  # fmt: skip
        with tagged(world, "1", signing.sign(payload, signer)):
            assert codes(check(world, f"models:/{NAME}/1")) == {"unreadable"}


def test_a_failed_decision_is_signed_too_and_is_no(world: World, said: Callable[..., Any]) -> None:
    version = world.version("doubtful", world.model("doubtful"))
    world.decided("doubtful", version, word=Word.INCONCLUSIVE)
    code, out = said(f"models:/doubtful/{version}")
    assert code == 1
    assert "the decision is FAILED, verdict inconclusive (verdict-clean" in out


def test_a_model_in_a_folder_needs_a_named_decision(world: World, said: Callable[..., Any]) -> None:
    folder = world.place / "models" / f"{NAME}-1"
    decision = f"{world.gate_uri}{attestation.FILE}"  # type: ignore[attr-defined]
    assert said(str(folder))[0] == 1
    assert said(str(folder), "--decision", decision)[0] == 0
    assert said(str(folder), "--decision", decision.removeprefix("file://"))[0] == 0
    code, out = said(str(world.place / "models" / f"{NAME}-2"), "--decision", decision)
    assert code == 1 and "the files have the digest" in out


def test_a_source_that_is_gone_is_no(world: World) -> None:
    folder = world.place / "models" / f"{NAME}-1"
    folder.rename(folder.with_name("away"))
    answer = check(world, f"models:/{NAME}/1")
    folder.with_name("away").rename(folder)
    assert codes(answer) == {"no-bytes"} and answer.digest is None


def test_json_says_the_same_for_machines(world: World, said: Callable[..., Any]) -> None:
    code, out = said(f"models:/{NAME}/2", "-o", "json")
    document = json.loads(out)
    assert (code, document["holds"]) == (1, False)
    assert document["checks"][0]["reasons"][0]["code"] == "unsigned"
    code, out = said(f"models:/{NAME}/1", "-o", "json")
    assert (code, json.loads(out)["checks"][0]["decision"]["result"]) == (0, "PASSED")


def test_the_audit_tells_where_each_alias_points(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    folders_ = [world.model(f"audited-{number}") for number in range(4)]
    versions = [world.version("audited", folder) for folder in folders_]
    world.decided("audited", versions[0])
    world.decided("audited", versions[1], word=Word.INCONCLUSIVE)
    world.decided("audited", versions[3], now=datetime.now(UTC) - timedelta(days=200))
    aliases = {"good": "1", "bad": "2", "new": "3", "old": "4"}
    for alias, version in aliases.items():
        registry.move_alias(world.uri, "audited", alias, version)
    command = ["gate", "audit", "--only", "audited", "-o", "json", *world.flags()]
    assert run_command(command) == 1
    states = {row["alias"]: row["state"] for row in json.loads(capfd.readouterr().out)}
    assert states == {"good": "ok", "champion": "expired", "bad": "failed", "new": "unscanned", "old": "expired"}
    (folders_[0] / "NOTE.txt").write_text("another")
    assert run_command(command) == 1
    states = {row["alias"]: row["state"] for row in json.loads(capfd.readouterr().out)}
    assert states["good"] == "changed"


def test_the_audit_of_what_is_in_order_exits_0(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["gate", "audit", "--only", NAME, *world.flags()]) == 0
    assert "champion" in capfd.readouterr().out


def test_the_audit_of_nothing_exits_3(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.version("plain", world.place / "models" / f"{NAME}-1")
    assert run_command(["gate", "audit", "--only", "plain", *world.flags()]) == 3
    assert "no alias" in capfd.readouterr().out


def test_promote_moves_an_alias_only_to_what_verifies(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["gate", "promote", "--alias", "production", *world.flags()]
    assert run_command([*command, f"models:/{NAME}/2"]) == 1
    assert "carries no signed decision" in capfd.readouterr().out
    assert registry.alias_holder(world.uri, NAME, "production") is None
    assert run_command([*command, f"models:/{NAME}@champion"]) == 0
    assert capfd.readouterr().out == f"yes  @production points at models:/{NAME}/1\n"
    assert registry.alias_holder(world.uri, NAME, "production") == "1"
    assert run_command(["gate", "promote", f"models:/{NAME}/1", "--alias", "a.b", *world.flags()]) == 2


@pytest.mark.parametrize("before", [None, "2"])
def test_promote_takes_the_alias_back_when_the_bytes_change_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    path = world.place / "models" / f"{NAME}-1" / "NOTE.txt"
    text, move = path.read_text(), registry.move_alias
    if before is not None:
        move(world.uri, NAME, "late", before)

    def move_and_change(*given: str) -> None:
        move(*given)
        path.write_text("swapped")

    monkeypatch.setattr(registry, "move_alias", move_and_change)
    answer, moved = Gatekeeper(world.settings).promote(f"models:/{NAME}/1", "late")
    path.write_text(text)
    assert not moved and codes(answer) == {"changed-bytes"}
    assert registry.alias_holder(world.uri, NAME, "late") == before


def test_an_unsigned_decision_takes_the_older_signed_one_away_and_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    version = world.version("unsigned", world.model("unsigned"))
    world.decided("unsigned", version)
    assert check(world, f"models:/unsigned/{version}").holds
    with caplog.at_level(logging.WARNING):
        uri = world.decided("unsigned", version, signed=False, policy={"version": 1, "rules": []})
    assert [record.message for record in caplog.records if "unsigned" in record.message] == [
        "the decision is unsigned: no signing key is configured"
    ]
    assert b"The decision is unsigned" in folders.read_file(uri, "report.html")
    assert codes(check(world, f"models:/unsigned/{version}")) == {"unsigned"}


def test_under_another_name_each_version_gets_a_decision_of_its_own(world: World) -> None:
    version = world.version("dev", world.model("dev"))
    uri = world.decided("dev", version, target="prod")
    assert check(world, f"models:/dev/{version}").holds
    assert check(world, "models:/prod@champion").holds
    first, second = (folders.read_file(uri, name) for name in (attestation.FILE, attestation.ORIGINAL_FILE))
    targets = [Statement.from_bytes(base64.b64decode(json.loads(text)["payload"])).target for text in (first, second)]
    assert targets == ["models:/prod/1", f"models:/dev/{version}"]


def test_run_again_the_decision_keeps_its_signature(world: World) -> None:
    version = world.version("again", world.model("again"))
    now = datetime(2026, 6, 1, tzinfo=UTC)
    first = (world.decided("again", version, now=now), tag(world, version, "again"))
    second = (world.decided("again", version, now=now + timedelta(hours=1)), tag(world, version, "again"))
    assert first == second


def test_the_private_key_is_written_nowhere(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The canary: the body of the key in no file, tag, log or output but its own file."""
    pem = Path(world.key["private_file"]).read_text()
    canary = pem.splitlines()[1]
    monkeypatch.setenv(attestation.KEY_VARIABLE, pem)
    version = world.version("canary", world.model("canary"))
    world.decided("canary", version, signed=False)  # the variable alone is the key
    assert check(world, f"models:/canary/{version}").holds
    shown = [tag(world, version, "canary")]
    for command in (["config", "show"], ["doctor"], ["gate", "check", f"models:/canary/{version}", *world.flags()]):
        run_command([*command, "--verbose"])
        shown += capfd.readouterr()
    monkeypatch.setenv(attestation.KEY_VARIABLE, pem.replace("PRIVATE", "PRIVAT"))
    with pytest.raises(InputError) as caught:
        attestation.signer(world.settings)
    shown.append(str(caught.value))
    monkeypatch.delenv(attestation.KEY_VARIABLE)
    broken = tmp_path / "broken.pem"
    broken.write_text(pem.replace("END", "EN"))
    given = dataclasses.replace(world.settings.signing, key_file=str(broken), trusted_keys=str(broken))
    for use in (attestation.signer, attestation.trusted_keys):
        with pytest.raises(InputError) as caught:
            use(world.settings.model_copy(update={"signing": given}))
        shown.append(str(caught.value))
    assert not [text for text in shown if canary in text]
    holding = [path for path in world.place.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]
    assert holding == [Path(world.key["private_file"])]


def test_a_new_key_is_for_its_owner_alone_and_replaces_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert run_command(["key", "generate", "--to", str(folder)]) == 0
    out = capfd.readouterr().out
    private = folder / "signing-key.pem"
    assert private.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "BEGIN PUBLIC KEY" in out and "PRIVATE" not in out
    held = private.read_bytes()
    assert run_command(["key", "generate", "--to", str(folder)]) == 2
    assert private.read_bytes() == held
    keys = attestation.trusted_keys(Settings(signing=SigningOptions(trusted_keys=str(folder))))
    assert [f"key id: {name}" in out for name in keys] == [True]
    with pytest.raises(InputError, match="holds a private key"):
        attestation.trusted_keys(Settings(signing=SigningOptions(trusted_keys=str(private))))
