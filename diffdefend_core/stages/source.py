"""Where a model comes from: folder, `file://`, `s3://`, `hf://` or `models:/` URI; its files are brought to one place.

Names, number and sizes are checked against the allow-list before a byte is fetched. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from diffdefend_core.artifacts import FileDigest
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.io import hub
from diffdefend_core.io.store import Entry, local_path, open_store, to_uri
from diffdefend_core.loading.formats import (
    MAX_FILES,
    check_count,
    check_distinct,
    check_name,
    check_total,
    format_of,
    list_files,
)


class Readable(Protocol):
    """The half of a store that loading needs."""

    def read(self, key: str) -> Iterator[bytes]:
        """Yield the object in pieces."""

    def entries(self, prefix: str, limit: int) -> list[Entry]:
        """Return the entries below a prefix, at most `limit`."""


@dataclass(frozen=True)
class Origin:
    """Where the files lie, what the model is called, and the registered version it came from, if any."""

    uri: str
    name: str
    registered_name: str | None = None
    registered_version: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files at an origin, unread: paths relative to the model, and how to read them.

    `left_out` are files of a repository that are no part of a model and stay where they are.
    """

    store: Readable
    prefix: str
    entries: tuple[Entry, ...]
    left_out: tuple[str, ...] = ()

    def name(self, entry: Entry) -> str:
        """Return the path of an entry inside the model."""
        return entry.key.removeprefix(self.prefix)


def find(source: str, name: str | None, settings: Settings) -> Origin:
    """Return where `source` is. Raises InputError at an unknown form, RegistryError."""
    if source.startswith(hub.SCHEME):
        return Origin(source, name or source.removeprefix(hub.SCHEME).partition("@")[0].rpartition("/")[2] or "model")
    if not source.startswith("models:"):
        uri = to_uri(source)
        place = local_path(uri) or PurePosixPath(uri.rstrip("/"))
        return Origin(uri, name or place.name or "model")
    from diffdefend_core.io import registry

    resolved = registry.resolve(settings.tracking_uri, source)
    return Origin(to_uri(resolved.source_uri), name or resolved.name, resolved.name, resolved.version)


def listing(uri: str, settings: Settings) -> Listing:
    """Return what lies at a URI. Raises InputError when there is nothing, StoreError."""
    if uri.startswith(hub.SCHEME):
        return _repository(uri, settings.allow_network)
    return _stored(uri)


def _stored(uri: str) -> Listing:
    store, prefix = open_store(uri)
    entries = store.entries(prefix, limit=MAX_FILES + 1)
    if not entries:
        raise InputError(
            f"there is nothing at {uri}", expected="a model in the layout of diffusers", action="check the URI"
        )
    return Listing(store, prefix, tuple(entries))


def digest_model(uri: str) -> tuple[FileDigest, ...]:
    """Return path, size and sha256 of every file of a model in a folder or bucket, read piece by piece and never kept.

    Raises as `bring` does.
    """
    local = local_path(uri)
    if local is not None:
        list_files(local)
    found = _stored(uri)
    check_limits(found, pickles=False)
    return tuple(_digest(found, entry) for entry in found.entries)


def bring(uri: str, target: Path, settings: Settings) -> tuple[str, ...]:
    """Bring the model's files to the new folder `target`, after all limits were checked; return remarks.

    Raises ModelRejectedError at a file that may not be there, InputError, StoreError.
    """
    local = local_path(uri)
    if local is not None:
        list_files(local, pickles=settings.allow_pickles)
    found = listing(uri, settings)
    check_limits(found, pickles=settings.allow_pickles and not uri.startswith(hub.SCHEME))
    for entry in found.entries:
        _download(found.store, entry, target / found.name(entry))
    return _remarks(found)


def check_limits(found: Listing, *, pickles: bool) -> None:
    """Raise ModelRejectedError at a file name, a number of files or a size that is not allowed."""
    check_count(len(found.entries))
    for entry in found.entries:
        check_name(found.name(entry), pickles=pickles)
    check_distinct(found.name(entry) for entry in found.entries)
    check_total(sum(entry.size for entry in found.entries))


def _repository(uri: str, network: bool) -> Listing:
    """A repository holds more than a model: pictures, other formats, pickles; those stay there."""
    store = hub.open_hub(uri, network=network)
    entries = store.entries(limit=10 * MAX_FILES)
    wanted = tuple(entry for entry in entries if format_of(entry.key) in ("json", "safetensors", "text"))
    if not any(format_of(entry.key) == "safetensors" for entry in wanted):
        raise ModelRejectedError(
            f"{uri} holds no safetensors",
            expected="weights as .safetensors: nothing else is taken from the Hub",
            action="choose a commit that has them, or convert the model where you trust it",
        )
    return Listing(store, "", wanted, tuple(entry.key for entry in entries if entry not in wanted))


def _remarks(found: Listing) -> tuple[str, ...]:
    if not found.left_out:
        return ()
    shown = ", ".join(found.left_out[:5]) + (", ..." if len(found.left_out) > 5 else "")
    return (f"{len(found.left_out)} files of the repository are no part of the model and were not fetched: {shown}",)


def _download(store: Readable, entry: Entry, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        file.writelines(_content(store, entry))


def _digest(found: Listing, entry: Entry) -> FileDigest:
    sha256 = hashlib.sha256()
    for chunk in _content(found.store, entry):
        sha256.update(chunk)
    return FileDigest(path=found.name(entry), size=entry.size, sha256=sha256.hexdigest())


def _content(store: Readable, entry: Entry) -> Iterator[bytes]:
    """Yield an object in pieces. Raises ModelRejectedError if it is not of the size that was listed."""
    left = entry.size
    for chunk in store.read(entry.key):
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left != 0:
        raise ModelRejectedError(
            f"{entry.key} is not of the size {entry.size} that was listed",
            expected="files that stay as they are while they are read",
            action="try again when nothing writes to the model",
        )
