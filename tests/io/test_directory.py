"""The directory store: atomic writes, and no way out."""

from pathlib import Path

import pytest

from diffdefend_core.errors import InputError, StoreError
from diffdefend_core.io.directory import DirectoryStore
from diffdefend_core.io.store import MissingObjectError, open_store, to_uri


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(b"content" * 1000)
    return path


def test_what_is_put_is_read(tmp_path: Path, source: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    entry = store.put("a/b.bin", source)
    assert b"".join(store.read("a/b.bin")) == source.read_bytes()
    assert store.entries("a/") == [entry]
    assert entry.size == 7000


def test_a_replaced_object_gets_another_tag(tmp_path: Path, source: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    assert store.put("a", source).tag != store.put("a", source).tag


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/passwd", "a\\..\\b", "a\0b", ""])
def test_a_key_never_leads_out(tmp_path: Path, source: Path, key: str) -> None:
    store = DirectoryStore(tmp_path / "store")
    with pytest.raises(StoreError):
        store.put(key, source)
    with pytest.raises(StoreError):
        list(store.read(key))


def test_links_are_listed_but_not_followed(tmp_path: Path, source: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "link").symlink_to(source)
    (root / "folder").symlink_to(tmp_path)
    store = DirectoryStore(root)
    assert [entry.key for entry in store.entries("")] == ["folder", "link"]
    for key in ("link", "folder/source.bin"):
        with pytest.raises(StoreError):
            list(store.read(key))
    with pytest.raises(StoreError):
        store.put("folder/new.bin", source)
    assert not (tmp_path / "new.bin").exists()


def test_a_failed_write_leaves_the_old_object(tmp_path: Path, source: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.put("a", source)
    with pytest.raises(StoreError):
        store.put("a", tmp_path)
    assert b"".join(store.read("a")) == source.read_bytes()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


def test_missing_objects_and_missing_roots(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "none")
    assert store.entries("") == []
    with pytest.raises(MissingObjectError):
        list(store.read("a"))


def test_a_listing_stops_at_its_limit(tmp_path: Path, source: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    for index in range(5):
        store.put(f"f{index}", source)
    assert len(store.entries("f", limit=3)) == 3


@pytest.mark.parametrize(
    "uri",
    ["/plain/path", "http://host/x", "file://host/x", "file:///a/../b", "s3://", "s3:///a", "s3://b/../c", "s3://b//c"],
)
def test_a_uri_must_name_a_store(uri: str) -> None:
    with pytest.raises(InputError, match="expected s3://bucket/prefix/"):
        open_store(uri)


def test_paths_with_spaces_and_percent_signs_become_uris(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "a folder 100%#?"
    folder.mkdir()
    (folder / "x").write_bytes(b"1")
    uri = to_uri(folder)
    store, prefix = open_store(uri)
    assert [entry.key for entry in store.entries(prefix)] == ["x"]
    assert to_uri(uri) == uri
