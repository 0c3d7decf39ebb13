"""A directory as object store: each write is atomic, and no key leads out of the directory."""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from operator import attrgetter
from pathlib import Path, PurePosixPath

from diffdefend_core.errors import StoreError
from diffdefend_core.io.store import CHUNK, MAX_ENTRIES, Entry, MissingObjectError

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.part")


class DirectoryStore:
    """Objects as files below `root`; symbolic links are listed but never followed."""

    def __init__(self, root: Path) -> None:
        """Take the directory `root`, which need not exist yet."""
        self.root = root

    def put(self, key: str, path: Path) -> Entry:
        """Copy the file under a temporary name in the target's folder, then rename it there."""
        target = self._path(key)
        with self._translated("write", key):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._stay_inside(key, target.parent)
            partial = target.parent / f".{uuid.uuid4().hex}.part"
            try:
                _copy_durably(path, partial)
                entry = _entry(key, partial)
                os.replace(partial, target)
                return entry
            finally:
                partial.unlink(missing_ok=True)

    def read(self, key: str) -> Iterator[bytes]:
        """Yield the file in pieces. Raises MissingObjectError if there is none."""
        path = self._path(key)
        with self._translated("read", key):
            self._stay_inside(key, path.parent)
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

    def entries(self, prefix: str, limit: int = MAX_ENTRIES) -> list[Entry]:
        """Return the files and links below `root` whose key begins with `prefix`, sorted, at most `limit`."""
        with self._translated("list", prefix):
            keys = (key for key in self._keys() if key.startswith(prefix))
            found = [_entry(key, self.root / key) for key in islice(keys, limit)]
            return sorted(found, key=attrgetter("key"))

    def _keys(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root, followlinks=False):
            base = Path(folder)
            folders.sort()
            links = [name for name in folders if (base / name).is_symlink()]
            for name in sorted([*links, *files]):
                if not UNFINISHED.fullmatch(name):
                    yield (base / name).relative_to(self.root).as_posix()

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or "\\" in key or "\0" in key or ".." in parts:
            raise self._escape(key)
        return self.root.joinpath(*parts)

    def _stay_inside(self, key: str, folder: Path) -> None:
        """A link inside the store must not lead out of it."""
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise self._escape(key)

    def _escape(self, key: str) -> StoreError:
        return StoreError(
            f"key {key!r} leads out of {self.root}",
            expected="a relative path inside the store",
            action="do not trust what named it",
        )

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise MissingObjectError(
                f"{self.root / key} does not exist", expected="a file", action="check the path or rerun its stage"
            ) from error
        except OSError as error:
            raise StoreError(
                f"cannot {verb} {self.root / key} ({error.strerror or error})",
                expected="a readable and writable directory",
                action="check its permissions and free space",
            ) from error


def _copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK)
        writer.flush()
        os.fsync(writer.fileno())


def _entry(key: str, path: Path) -> Entry:
    status = path.lstat()
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Entry(key=key, size=size, tag=f"{status.st_ino}-{status.st_mtime_ns}-{size}")
