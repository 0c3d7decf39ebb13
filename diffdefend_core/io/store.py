"""The port to the object store: files under keys, at `s3://bucket/prefix/` or `file:///dir/`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from diffdefend_core.errors import InputError, MissingExtraError, StoreError

CHUNK = 1 << 20
MAX_ENTRIES = 100_000


class MissingObjectError(StoreError):
    """Raised when a key does not exist, in a store that answers."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing: its key, its size in bytes, and a tag that changes when its content does."""

    key: str
    size: int
    tag: str


class ObjectStore(Protocol):
    """What DiffDefend needs of a store. Keys are relative POSIX paths; every method raises StoreError."""

    def put(self, key: str, path: Path) -> Entry:
        """Store the file at `path` under `key`, replacing what is there, whole or not at all."""

    def read(self, key: str) -> Iterator[bytes]:
        """Yield the object in pieces of about 1 MiB. Raises MissingObjectError if there is none."""

    def entries(self, prefix: str, limit: int = MAX_ENTRIES) -> list[Entry]:
        """Return the entries whose key begins with `prefix`, sorted by key, at most `limit` of them."""


def to_uri(path_or_uri: str | Path) -> str:
    """Return a URI as it is, and a local path as an absolute `file://` URI."""
    text = str(path_or_uri)
    return text if "://" in text else "file://" + quote(os.path.abspath(Path(text).expanduser()))


def open_store(uri: str) -> tuple[ObjectStore, str]:
    """Return the store that `uri` lies in, and the key prefix there: empty or ending with `/`.

    Raises InputError when the URI is not `s3://bucket/prefix/` or `file:///dir/`, or the S3 settings are wrong.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("s3", "file"):
        raise _wrong(uri)
    if scheme == "file":
        return _open_directory(uri, rest)
    bucket, _, prefix = rest.partition("/")
    if not bucket or not _is_plain(prefix):
        raise _wrong(uri)
    return _open_bucket(bucket), f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""


def local_path(uri: str) -> Path | None:
    """Return the folder that a `file://` URI names, and None for any other URI."""
    scheme, _, rest = uri.partition("://")
    return Path(unquote(rest)) if scheme == "file" else None


def _open_bucket(bucket: str) -> ObjectStore:
    try:
        from diffdefend_core.io.s3 import S3Store
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed",
            expected="the client of S3-compatible stores",
            action="install diffdefend[s3]",
        ) from error
    return S3Store(bucket)


def _open_directory(uri: str, rest: str) -> tuple[ObjectStore, str]:
    from diffdefend_core.io.directory import DirectoryStore

    path = unquote(rest)
    if not path.startswith("/") or not _is_plain(path[1:]):
        raise _wrong(uri)
    return DirectoryStore(Path(path)), ""


def _is_plain(prefix: str) -> bool:
    parts = prefix.removesuffix("/").split("/") if prefix.strip("/") else []
    return "\0" not in prefix and not any(part in ("", ".", "..") for part in parts)


def _wrong(uri: str) -> InputError:
    return InputError(
        f"the URI is {uri[:200]!r}", expected="s3://bucket/prefix/ or file:///dir/", action="correct the URI"
    )
