"""Stage folders in the object store: published whole, verified on read.

A folder is finished when its `manifest.json` is there; it is written last. Every file that is read is compared with
the manifest on the way. Nothing here trusts the store: a changed, missing or added file is an ArtifactError.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from diffdefend_core.artifacts import FileDigest, Manifest, Parent
from diffdefend_core.errors import ArtifactError, InputError, StoreError
from diffdefend_core.io.store import Entry, MissingObjectError, ObjectStore, open_store
from diffdefend_core.provenance import digest_of

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
PUBLISH_ROUNDS = 10


def digest_files(folder: Path) -> tuple[FileDigest, ...]:
    """Return path, size and sha256 of every file below `folder`, sorted by path. Raises InputError at a link."""
    return tuple(_digest_file(folder, path) for path in _paths(folder))


def content_digest(files: Iterable[FileDigest]) -> str:
    """Return the sha256 (hex) over the sorted (path, sha256) of `files`: the digest of a folder's content."""
    digest = hashlib.sha256()
    for path, sha256 in sorted((file.path, file.sha256) for file in files):
        digest.update(f"{sha256}  {path}\n".encode())
    return digest.hexdigest()


def seal_of(manifest: Mapping[str, Any]) -> str:
    """Return the seal of a manifest, given as plain JSON values: fields that only a newer version knows count too."""
    return digest_of({name: value for name, value in manifest.items() if name != "seal"})


def publish(folder: Path, uri: str, *, stage: str, key: str, producer: str, parents: Sequence[Parent] = ()) -> Manifest:
    """Upload all files of `folder` to `uri`, `manifest.json` last, and return the manifest that stands there.

    A folder that is already finished is left as it is. Writers of one key may meet: each checks at the end that what
    stands there is its own, otherwise waits a random time, takes the folder if it is whole by then, and writes again if
    it is not. Raises StoreError, InputError.
    """
    standing = read_manifest(uri)
    if standing is not None:
        return standing

    def described() -> Manifest:
        files = digest_files(folder)
        manifest = Manifest(
            stage=stage, key=key, producer=producer, digest=content_digest(files), files=files, parents=tuple(parents)
        )
        return replace(manifest, seal=seal_of(manifest.to_dict()))

    with ThreadPoolExecutor(1) as beside:  # the files are digested while they are sent
        manifest = beside.submit(described)
        for collisions in range(1, PUBLISH_ROUNDS + 1):
            if _write(folder, uri, manifest):
                return manifest.result()
            time.sleep(random.uniform(0, 0.05 * 2**collisions))
            standing = _whole(uri)
            if standing is not None:
                return standing
    raise StoreError(
        f"{uri} is not what was written, again and again",
        expected="a store that keeps what it is sent, and one writer at a time",
        action="stop the other writers, or check the store",
    )


def _write(folder: Path, uri: str, manifest: Future[Manifest]) -> bool:
    """Upload files and manifest; return whether all are there whole, untouched by any other writer until the end."""
    store, prefix = open_store(uri)
    names = [path.relative_to(folder).as_posix() for path in _paths(folder)]
    _check_names(names, uri)
    entries = {name: store.put(prefix + name, folder / name) for name in names}
    described = manifest.result()
    if {name: entry.size for name, entry in entries.items()} != {file.path: file.size for file in described.files}:
        return False
    written = {*entries.values(), _put_manifest(store, prefix, described)}
    return written <= set(store.entries(prefix))


def _paths(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, sorted. Raises InputError at what is no plain file."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise InputError(f"{path} is not a plain file", expected="plain files", action="replace it by a copy")
        if path.is_file():
            yield path


def _whole(uri: str) -> Manifest | None:
    """Return the manifest of the folder at `uri` if all its files are as it says, and None otherwise."""
    with tempfile.TemporaryDirectory(prefix="diffdefend-") as scratch:
        try:
            return fetch(uri, Path(scratch))
        except ArtifactError:
            return None


def read_manifest(uri: str) -> Manifest | None:
    """Return the manifest of the folder at `uri`, and None if it has none, so is unfinished.

    Raises ArtifactError when the manifest is damaged, of a newer major version, or names a file outside the folder.
    """
    store, prefix = open_store(uri)
    try:
        text = b"".join(_bounded(store.read(prefix + MANIFEST), MAX_MANIFEST_BYTES))
    except MissingObjectError:
        return None
    if len(text) > MAX_MANIFEST_BYTES:
        raise _altered(uri, f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    manifest = Manifest.from_json(text)
    if (manifest.seal or manifest.schema_version != "1.0") and manifest.seal != seal_of(json.loads(text)):
        raise _altered(uri, f"the seal of {MANIFEST} is not that of its fields")
    _check_names([file.path for file in manifest.files], uri)
    if min((file.size for file in manifest.files), default=0) < 0:
        raise _altered(uri, f"a size in {MANIFEST} is negative")
    if content_digest(manifest.files) != manifest.digest:
        raise _altered(uri, f"the digest in {MANIFEST} is not that of its file list")
    return manifest


def finished(uri: str, stage: str) -> Manifest:
    """Return the manifest of the finished folder of `stage` at `uri`. Raises ArtifactError if it is not one."""
    manifest = read_manifest(uri)
    if manifest is None:
        raise ArtifactError(
            f"{uri} has no {MANIFEST}", expected=f"a finished {stage} folder", action=f"run the {stage} stage first"
        )
    if manifest.stage != stage:
        raise ArtifactError(
            f"{uri} is a folder of the {manifest.stage} stage",
            expected=f"a folder of the {stage} stage",
            action="check the order of the arguments",
        )
    return manifest


def fetch(uri: str, into: Path, *, prefix: str = "") -> Manifest:
    """Download the files whose path begins with `prefix` to `into`, keeping their paths; return the manifest.

    Raises ArtifactError that lists every changed, missing and added file, and then leaves nothing in `into`.
    """
    manifest = _required_manifest(uri)
    store, base = open_store(uri)
    wanted = {file.path: file for file in manifest.files if file.path.startswith(prefix)}
    present = {item.key.removeprefix(base): item.size for item in store.entries(base)}
    names = sorted(name for name in present if name.startswith(prefix) and name not in wanted and name != MANIFEST)
    differences = [f"{name} added" for name in names]
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into) as scratch:
        for name, file in wanted.items():
            problem = _download(store, base, file, present.get(name), Path(scratch))
            differences += [f"{name} {problem}"] if problem else []
        if differences:
            raise _altered(uri, ", ".join(differences))
        for child in Path(scratch).iterdir():
            _move(child, into / child.name)
    return manifest


def read_file(uri: str, name: str) -> bytes:
    """Return the verified content of the small file `name` of the folder at `uri`. Raises ArtifactError."""
    manifest = _required_manifest(uri)
    file = next((file for file in manifest.files if file.path == name), None)
    if file is None:
        raise ArtifactError(
            f"{uri} of the {manifest.stage} stage holds no {name}", expected=name, action="check the URI"
        )
    store, base = open_store(uri)
    try:
        content = b"".join(_bounded(store.read(base + name), file.size))
    except MissingObjectError as error:
        raise _altered(uri, f"{name} missing") from error
    if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
        raise _altered(uri, f"{name} changed")
    return content


def _digest_file(folder: Path, path: Path) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256)


def _check_names(names: Sequence[str], uri: str) -> None:
    """Refuse names that would lead out of a folder, hide the manifest, or come twice."""
    seen: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        bad = not parts or name != "/".join(parts) or parts[0] == "/" or ".." in parts or "\\" in name
        if bad or "\0" in name or name == MANIFEST or name in seen:
            raise ArtifactError(
                f"{uri} lists the file {name!r}",
                expected="each relative path inside the folder once",
                action="do not use this folder; rerun its stage",
            )
        seen.add(name)


def _put_manifest(store: ObjectStore, prefix: str, manifest: Manifest) -> Entry:
    with tempfile.TemporaryDirectory(prefix="diffdefend-") as scratch:
        path = Path(scratch) / MANIFEST
        path.write_text(manifest.to_json(), encoding="utf-8")
        return store.put(prefix + MANIFEST, path)


def _required_manifest(uri: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest is None:
        raise ArtifactError(f"{uri} has no {MANIFEST}", expected="a finished folder", action="run its stage first")
    return manifest


def _download(store: ObjectStore, base: str, file: FileDigest, size: int | None, scratch: Path) -> str | None:
    """Write one file to `scratch`; return None, or what is wrong with it."""
    if size is None:
        return "missing"
    if size != file.size:
        return f"changed (size {size} instead of {file.size})"
    target = scratch / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    try:
        with target.open("xb") as writer, ThreadPoolExecutor(1) as beside:  # digested while the next piece comes
            digested = beside.submit(digest.update, b"")
            for chunk in _bounded(store.read(base + file.path), file.size):
                digested.result()
                digested = beside.submit(digest.update, chunk)
                count += len(chunk)
                writer.write(chunk)
    except MissingObjectError:
        return "missing"
    return None if count == file.size and digest.hexdigest() == file.sha256 else "changed (another sha256)"


def _bounded(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Yield chunks until more than `limit` bytes came: a store cannot fill the memory or the disk."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        yield chunk
        if total > limit:
            return


def _move(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():
        for child in source.iterdir():
            _move(child, target / child.name)
        return
    shutil.move(source, target)


def _altered(uri: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{uri} is not what its stage wrote: {what}",
        expected="the files of its manifest, unchanged",
        action="delete the folder and rerun its stage, and find out who changed it",
    )
