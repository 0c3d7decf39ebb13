"""Laws of stage folders, over a directory and over a real S3 server: all or nothing, and nothing unnoticed."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3Server

from diffdefend_core.artifacts import FileDigest, Manifest, Parent
from diffdefend_core.errors import ArtifactError, InputError
from diffdefend_core.io import folders
from diffdefend_core.io.store import open_store

FILES = {"record.json": b'{"a": 1}', "model/weights.bin": bytes(range(256)) * 64, "model/config.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def uri(store_uri: str, folder: Path) -> str:
    uri = f"{store_uri}/load/key/"
    publish(folder, uri)
    return uri


def publish(folder: Path, uri: str, **changes: str) -> Manifest:
    parent = Parent(stage="none", uri="file:///none/", digest="0")
    return folders.publish(
        folder, uri, **{"stage": "load", "key": "k", "producer": "test", **changes}, parents=[parent]
    )


def overwrite(uri: str, name: str, content: bytes, scratch: Path) -> None:
    store, prefix = open_store(uri)
    path = scratch / "tampered"
    path.write_bytes(content)
    store.put(prefix + name, path)


Delete = Callable[[str], None]


@pytest.fixture
def delete(request: pytest.FixtureRequest, uri: str) -> Delete:
    """Delete a file of the folder behind the store's back: its port cannot delete at all."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return lambda name: (Path(rest) / name).unlink()
    server: S3Server = request.getfixturevalue("s3_server")
    bucket, _, prefix = rest.partition("/")
    return lambda name: server.client.remove_object(bucket, prefix + name)


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_published_is_fetched(uri: str, tmp_path: Path) -> None:
    manifest = folders.fetch(uri, tmp_path / "into")
    assert content_of(tmp_path / "into") == FILES
    assert manifest == folders.read_manifest(uri) == folders.finished(uri, "load")
    assert manifest.digest == folders.content_digest(manifest.files)
    assert folders.read_file(uri, "record.json") == FILES["record.json"]


def test_a_prefix_selects_files(uri: str, tmp_path: Path) -> None:
    folders.fetch(uri, tmp_path / "into", prefix="model/")
    assert sorted(content_of(tmp_path / "into")) == ["model/config.json", "model/weights.bin"]


def test_fetching_into_a_folder_keeps_what_lies_there(uri: str, tmp_path: Path) -> None:
    (tmp_path / "into" / "model").mkdir(parents=True)
    (tmp_path / "into" / "model" / "mine").write_bytes(b"1")
    folders.fetch(uri, tmp_path / "into")
    assert content_of(tmp_path / "into") == {**FILES, "model/mine": b"1"}


def tamper_flip(uri: str, scratch: Path, delete: Delete) -> None:
    flipped = bytearray(FILES["model/weights.bin"])
    flipped[100] ^= 1
    overwrite(uri, "model/weights.bin", bytes(flipped), scratch)


def tamper_truncate(uri: str, scratch: Path, delete: Delete) -> None:
    overwrite(uri, "model/weights.bin", FILES["model/weights.bin"][:-1], scratch)


def tamper_grow(uri: str, scratch: Path, delete: Delete) -> None:
    overwrite(uri, "model/weights.bin", FILES["model/weights.bin"] + b"0", scratch)


def tamper_delete(uri: str, scratch: Path, delete: Delete) -> None:
    delete("model/weights.bin")


def tamper_add(uri: str, scratch: Path, delete: Delete) -> None:
    overwrite(uri, "model/weights.bin.py", b"import os", scratch)


def tamper_rename(uri: str, scratch: Path, delete: Delete) -> None:
    delete("model/weights.bin")
    overwrite(uri, "model/weights2.bin", FILES["model/weights.bin"], scratch)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (tamper_flip, ["model/weights.bin changed"]),
        (tamper_truncate, ["model/weights.bin changed"]),
        (tamper_grow, ["model/weights.bin changed"]),
        (tamper_delete, ["model/weights.bin missing"]),
        (tamper_add, ["model/weights.bin.py added"]),
        (tamper_rename, ["model/weights2.bin added", "model/weights.bin missing"]),
    ],
)
def test_every_tampering_is_named_and_leaves_nothing(uri, tmp_path, delete, tamper, named) -> None:
    tamper(uri, tmp_path, delete)
    with pytest.raises(ArtifactError) as caught:
        folders.fetch(uri, tmp_path / "into")
    for words in named:
        assert words in str(caught.value)
    assert list((tmp_path / "into").iterdir()) == []


def test_tampering_outside_the_prefix_is_not_fetched_nor_blamed(uri: str, tmp_path: Path) -> None:
    overwrite(uri, "record.json", b"changed", tmp_path)
    folders.fetch(uri, tmp_path / "into", prefix="model/")
    assert sorted(content_of(tmp_path / "into")) == ["model/config.json", "model/weights.bin"]


def test_a_single_file_is_verified(uri: str, tmp_path: Path) -> None:
    overwrite(uri, "record.json", b'{"a": 2}', tmp_path)
    with pytest.raises(ArtifactError, match=r"record\.json changed"):
        folders.read_file(uri, "record.json")
    with pytest.raises(ArtifactError, match="holds no other"):
        folders.read_file(uri, "other.json")


def test_a_half_written_folder_is_invisible(store_uri: str, tmp_path: Path) -> None:
    uri = f"{store_uri}/load/half/"
    overwrite(uri, "record.json", b"{}", tmp_path)
    assert folders.read_manifest(uri) is None
    with pytest.raises(ArtifactError, match=r"no manifest\.json; expected a finished load folder; run the load stage"):
        folders.finished(uri, "load")
    with pytest.raises(ArtifactError):
        folders.fetch(uri, tmp_path / "into")


def test_a_folder_of_another_stage_is_refused(uri: str) -> None:
    with pytest.raises(ArtifactError, match="of the load stage; expected a folder of the detect stage"):
        folders.finished(uri, "detect")


def rewrite_manifest(uri: str, scratch: Path, **changes: object) -> None:
    manifest = folders.read_manifest(uri)
    assert manifest is not None
    fields = {**manifest.to_dict(), **changes}
    sealed = {**fields, "seal": folders.seal_of(fields)}
    overwrite(uri, folders.MANIFEST, json.dumps(sealed).encode(), scratch)


def test_a_newer_major_version_is_refused_and_a_newer_minor_one_read(uri: str, tmp_path: Path) -> None:
    rewrite_manifest(uri, tmp_path, schema_version="1.9", added_later=True)
    assert folders.read_manifest(uri) is not None
    rewrite_manifest(uri, tmp_path, schema_version="2.0")
    with pytest.raises(ArtifactError, match="upgrade DiffDefend"):
        folders.read_manifest(uri)


@pytest.mark.parametrize("field", ["producer", "key", "parents"])
def test_a_flipped_bit_in_any_field_of_the_manifest_is_refused(uri: str, tmp_path: Path, field: str) -> None:
    manifest = folders.read_manifest(uri)
    assert manifest is not None
    changed = manifest.to_json().replace(f'"{field}": "', f'"{field}": "~').replace("file:///none/", "file:///nono/")
    overwrite(uri, folders.MANIFEST, changed.encode(), tmp_path)
    with pytest.raises(ArtifactError, match=r"the seal of manifest\.json"):
        folders.read_manifest(uri)


def test_a_manifest_of_before_the_seal_is_read(uri: str, tmp_path: Path) -> None:
    manifest = folders.read_manifest(uri)
    assert manifest is not None
    fields = {name: value for name, value in manifest.to_dict().items() if name != "seal"}
    overwrite(uri, folders.MANIFEST, json.dumps({**fields, "schema_version": "1.0"}).encode(), tmp_path)
    assert folders.read_manifest(uri) is not None
    overwrite(uri, folders.MANIFEST, json.dumps(fields).encode(), tmp_path)
    with pytest.raises(ArtifactError, match="seal"):
        folders.read_manifest(uri)


def test_a_manifest_whose_list_was_edited_is_refused(uri: str, tmp_path: Path) -> None:
    rewrite_manifest(uri, tmp_path, files=[])
    with pytest.raises(ArtifactError, match="not that of its file list"):
        folders.read_manifest(uri)


@pytest.mark.parametrize(
    "name", ["../up", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "./a", "a//b", "manifest.json"]
)
def test_a_manifest_cannot_name_a_file_outside(uri: str, tmp_path: Path, name: str) -> None:
    file = FileDigest(path=name, size=1, sha256="0")
    rewrite_manifest(uri, tmp_path, files=[file.to_dict()], digest=folders.content_digest([file]))
    with pytest.raises(ArtifactError, match="lists the file"):
        folders.fetch(uri, tmp_path / "into")


def test_a_finished_folder_is_never_overwritten(uri: str, folder: Path) -> None:
    (folder / "record.json").write_bytes(b"other bytes")
    manifest = publish(folder, uri)
    assert manifest == folders.read_manifest(uri)
    assert folders.read_file(uri, "record.json") == FILES["record.json"]


def test_writers_of_one_key_that_meet_leave_one_whole_folder(
    store_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer's bytes land between the first one's files and its manifest."""
    uri = f"{store_uri}/load/raced/"
    put_manifest, raced = folders._put_manifest, []

    def race(store, prefix, manifest):
        if not raced:
            raced.append(True)
            overwrite(uri, "record.json", b"the other's", tmp_path)
        return put_manifest(store, prefix, manifest)

    monkeypatch.setattr(folders, "_put_manifest", race)
    publish(folder, uri)
    folders.fetch(uri, tmp_path / "into")
    assert raced and content_of(tmp_path / "into") == FILES


def test_a_whole_folder_of_another_writer_is_taken(
    store_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, put_manifest = f"{store_uri}/load/lost/", folders._put_manifest

    def race(store, prefix, manifest):
        ours = put_manifest(store, prefix, manifest)
        theirs = dataclasses.replace(manifest, producer="the other")
        put_manifest(store, prefix, dataclasses.replace(theirs, seal=folders.seal_of(theirs.to_dict())))
        return ours

    monkeypatch.setattr(folders, "_put_manifest", race)
    assert publish(folder, uri).producer == "the other"


@pytest.mark.parametrize("alike", [True, False])
def test_writers_at_the_same_time_leave_one_whole_folder(tmp_path: Path, alike: bool) -> None:
    uri, writers = f"file://{tmp_path}/store/load/many/", []
    for writer in range(4):
        (tmp_path / f"w{writer}").mkdir()
        for name in "abcdef":
            (tmp_path / f"w{writer}/{name}").write_bytes(f"{0 if alike else writer}".encode() * 1000)
        writers.append(tmp_path / f"w{writer}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda folder: publish(folder, uri), writers))
    folders.fetch(uri, tmp_path / "into")
    assert len(set(content_of(tmp_path / "into").values())) == 1


def test_the_digest_depends_on_names_and_content_only(folder: Path, tmp_path: Path) -> None:
    files = folders.digest_files(folder)
    assert folders.content_digest(files) == folders.content_digest(reversed(files))
    renamed = [dataclasses.replace(files[0], path="other"), *files[1:]]
    assert folders.content_digest(renamed) != folders.content_digest(files)
    assert [file.path for file in files] == sorted(FILES)


def test_links_are_not_published(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="not a plain file"):
        publish(folder, f"file://{tmp_path}/store/x/")
