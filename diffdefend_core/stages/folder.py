"""What every stage does around its work: name its output by its inputs, reuse it if finished, publish it whole.

The output folder is `<store>/<stage>/<key>/` with key = digest of (stage, input digests, options, code version). A
stage that finds its finished output returns it at once, so a retried run goes on where it stopped.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from diffdefend_core.artifacts import Parent
from diffdefend_core.errors import StoreError
from diffdefend_core.io import folders
from diffdefend_core.provenance import code_version, digest_of
from diffdefend_core.records import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


def parent(stage: str, uri: str) -> Parent:
    """Return the finished folder of `stage` at `uri`. Raises ArtifactError if it is unfinished or of another stage."""
    return Parent(stage=stage, uri=uri, digest=folders.finished(uri, stage).digest)


def key_of(stage: str, parents: Sequence[Parent], options: Mapping[str, object]) -> str:
    """Return the name of a stage's output folder: a digest of all that it depends on."""
    return digest_of([stage, [item.digest for item in parents], options, code_version()])[:32]


def run_once(
    stage: str, *, store: str, parents: Sequence[Parent], options: Mapping[str, object], work: Callable[[Path], None]
) -> str:
    """Return the URI of the stage's output folder; call `work(folder)` to fill it only if it is not there yet."""
    key = key_of(stage, parents, options)
    uri = f"{store.rstrip('/')}/{stage}/{key}/"
    if folders.read_manifest(uri) is None:
        with tempfile.TemporaryDirectory(prefix=f"diffdefend-{stage}-") as folder:
            with _naming_full_disk(folder):
                work(Path(folder))
            folders.publish(Path(folder), uri, stage=stage, key=key, producer=code_version(), parents=tuple(parents))
    return uri


@contextmanager
def _naming_full_disk(folder: str) -> Iterator[None]:
    """Turn the error of a disk that takes no more into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"cannot write to {folder}: the disk is full",
            expected="room for the folder of the stage; nothing was published",
            action="make room there, or name another place with TMPDIR, and run it again",
        ) from error


def write_record(folder: Path, name: str, record: Record) -> None:
    """Write a record as `<name>.json` into a stage folder that is being filled."""
    (folder / f"{name}.json").write_text(record.to_json(), encoding="utf-8")


def read_record(kind: type[AnyRecord], uri: str, name: str) -> AnyRecord:
    """Read and verify `<name>.json` of the finished stage folder at `uri`. Raises ArtifactError."""
    return kind.from_json(folders.read_file(uri, f"{name}.json"))
