"""What lies at a model URI, and whether it may be loaded. No torch, and no weight is more than read for finiteness.

A model that would be refused is shown as far as it can be looked at without parsing what refused it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdefend_core.artifacts import FileDigest
from diffdefend_core.config import Settings
from diffdefend_core.errors import MissingExtraError, ModelRejectedError
from diffdefend_core.io.folders import content_digest
from diffdefend_core.io.store import Entry, local_path
from diffdefend_core.loading.formats import MAX_FILES, MAX_TOTAL_BYTES, TORCH_PICKLES, format_of
from diffdefend_core.loading.pickles import convert_pickles, finding_of, scan_pickle
from diffdefend_core.loading.static import Contents, Inspection, inspect_contents, inspect_folder
from diffdefend_core.stages.source import Listing, bring, find, listing

SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class _Seen:
    """What became of the files: their contents, or why they are refused."""

    contents: Contents | None
    refusal: str | None
    pickles: tuple[FileDigest, ...] = ()
    findings: tuple[str, ...] = ()


def inspect_model(source: str, *, settings: Settings) -> dict[str, Any]:
    """Return what is at `source` as plain values; `accepted` says whether `load` would take it, `refusal` why not.

    Raises InputError when there is nothing, StoreError, RegistryError.
    """
    origin = find(source, None, settings)
    found = listing(origin.uri, settings)
    with tempfile.TemporaryDirectory(prefix="diffdefend-inspect-") as scratch:
        seen = _look(origin.uri, Path(scratch) / "model", settings)
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "diffdefend",
        "name": origin.name,
        "source": source,
        "accepted": seen.refusal is None,
        "refusal": seen.refusal,
        **_model(seen.contents),
        "findings": [*(seen.findings if seen.contents else _scanned(origin.uri, found))],
        "files": _files(found, seen),
    }


def _look(uri: str, folder: Path, settings: Settings) -> _Seen:
    """Do what the load stage does with the files; a refusal is part of the answer."""
    try:
        remarks = bring(uri, folder, settings)
        pickles = convert_pickles(folder) if settings.allow_pickles else ()
        contents = inspect_contents(folder) if settings.adapter else inspect_folder(folder)
    except ModelRejectedError as error:
        return _Seen(None, str(error))
    return _Seen(contents, None, pickles, (*map(finding_of, pickles), *remarks, *contents.findings))


def _model(contents: Contents | None) -> dict[str, Any]:
    """Return what the checks found, with the same keys for a model that was refused."""
    tensors = [
        {"file": file, "name": info.name, "dtype": info.dtype, "shape": list(info.shape)}
        for file, found in (contents.tensors if contents else {}).items()
        for info in found.values()
    ]
    known = contents if isinstance(contents, Inspection) else None
    return {
        "digest": content_digest(contents.files) if contents else None,
        "family": known.family if known else None,
        "pipeline": known.pipeline if known else None,
        "classes": known.classes if known else {},
        "shape": list(known.shape) if known else None,
        "picture_shape": list(known.picture_shape) if known else None,
        "parameters": contents.parameters if contents else None,
        "dtypes": dict(_dtypes(contents)) if contents else {},
        "tensors": tensors,
    }


def _dtypes(contents: Contents) -> Counter[str]:
    """Count the elements of every dtype."""
    counter: Counter[str] = Counter()
    for found in contents.tensors.values():
        for info in found.values():
            counter[info.dtype] += info.elements
    return counter


def _scanned(uri: str, found: Listing) -> tuple[str, ...]:
    """Return what a static scan says of the pickles of a refused model, if they lie on this machine."""
    local = local_path(uri)
    names = [found.name(entry) for entry in found.entries[:MAX_FILES] if entry.size]
    if local is None:
        return ()
    return tuple(_verdict_on(local / name, name) for name in names if Path(name).suffix in TORCH_PICKLES)


def _verdict_on(path: Path, name: str) -> str:
    try:
        return f"{name}: picklescan found nothing, it imports {', '.join(scan_pickle(path))}"
    except (ModelRejectedError, MissingExtraError) as error:
        return f"{name}: {error.found}"


def _files(found: Listing, seen: _Seen) -> list[dict[str, Any]]:
    """Return path, format, size and sha256 of every file; the digest of what may not be read is None."""
    known = {file.path: file.sha256 for file in (*(seen.contents.files if seen.contents else ()), *seen.pickles)}
    entries = found.entries[:MAX_FILES]
    readable = sum(entry.size for entry in entries) <= MAX_TOTAL_BYTES
    return [
        {
            "path": found.name(entry),
            "format": format_of(found.name(entry)),
            "size": entry.size,
            "sha256": known.get(found.name(entry)) or (_sha256(found, entry) if readable else None),
        }
        for entry in entries
    ]


def _sha256(found: Listing, entry: Entry) -> str | None:
    """A store lists links and special files as empty: they are not opened."""
    if not entry.size:
        return None
    digest = hashlib.sha256()
    for chunk in found.store.read(entry.key):
        digest.update(chunk)
    return digest.hexdigest()
