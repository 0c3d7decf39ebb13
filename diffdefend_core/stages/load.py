"""The load stage: take a model from wherever it is, check it without running it, and give it an address. No torch."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffdefend_core.artifacts import FileDigest, ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.io.folders import content_digest
from diffdefend_core.io.store import Entry, ObjectStore, local_path, open_store, to_uri
from diffdefend_core.loading.adapters import call_adapter, describe
from diffdefend_core.loading.adapters import origin as adapter_origin
from diffdefend_core.loading.formats import MAX_FILES, check_count, check_name, list_files
from diffdefend_core.loading.static import Inspection, inspect_contents, inspect_folder
from diffdefend_core.stages.folder import run_once, write_record

STAGE = "load"
MAX_TOTAL_BYTES = 50 * 10**9
ADAPTED = "adapter "


@dataclass(frozen=True)
class _Origin:
    """Where the files lie, what the model is called, and the registered version it came from, if any."""

    uri: str
    name: str
    registered_name: str | None = None
    registered_version: str | None = None


def load(source: str, *, settings: Settings, name: str | None = None) -> str:
    """Check the model at `source` and return the URI of its load folder: `model_ref.json` and `model/`.

    `source` is a folder, a `file://` or `s3://` URI, or `models:/name/version` or `models:/name@alias`. With
    `settings.adapter` the layout is that of the adapter, which builds the model once. Raises InputError when there is
    nothing or the adapter fails, ModelRejectedError when the model may not be loaded, StoreError, RegistryError.
    """
    origin = _origin(source, name, settings)
    with tempfile.TemporaryDirectory(prefix="diffdefend-source-") as scratch:
        model = Path(scratch) / "model"
        _copy(origin.uri, model)
        reference = _reference(source, origin, model, settings.adapter)

        def work(folder: Path) -> None:
            shutil.move(model, folder / "model")
            write_record(folder, "model_ref", reference)

        options = {
            "content": reference.digest,
            "pipeline": reference.pipeline,
            "findings": reference.findings,
            "name": reference.name,
            "registered_name": reference.registered_name,
            "registered_version": reference.registered_version,
        }
        return run_once(STAGE, store=settings.store, parents=(), options=options, work=work)


def _origin(source: str, name: str | None, settings: Settings) -> _Origin:
    if not source.startswith("models:"):
        uri = to_uri(source)
        place = local_path(uri) or PurePosixPath(uri.rstrip("/"))
        return _Origin(uri, name or place.name or "model")
    from diffdefend_core.io import registry

    resolved = registry.resolve(settings.tracking_uri, source)
    return _Origin(to_uri(resolved.source_uri), name or resolved.name, resolved.name, resolved.version)


def _reference(source: str, origin: _Origin, folder: Path, adapter: str) -> ModelRef:
    contents = inspect_contents(folder) if adapter else inspect_folder(folder)
    if isinstance(contents, Inspection):
        family, pipeline, shape, findings = contents.family, contents.pipeline, contents.shape, contents.findings
    else:
        family, shape = describe(adapter, call_adapter(adapter, folder, "cpu"))
        pipeline = f"{ADAPTED}{adapter}"
        findings = (*contents.findings, f"built by the adapter {adapter} ({adapter_origin(adapter)})")
    return ModelRef(
        name=origin.name,
        source=source,
        digest=content_digest(contents.files),
        family=family,
        pipeline=pipeline,
        shape=shape,
        parameters=contents.parameters,
        files=contents.files,
        weights_sha256=contents.weights_sha256,
        registered_name=origin.registered_name,
        registered_version=origin.registered_version,
        findings=findings,
    )


def list_model(uri: str) -> tuple[ObjectStore, str, list[Entry]]:
    """Return the store, the key prefix and the files of the model at `uri`; names, number and sizes are checked.

    Raises InputError when there is nothing, ModelRejectedError at what may not be in a model folder, StoreError.
    """
    local = local_path(uri)
    if local is not None:
        list_files(local)
    store, prefix = open_store(uri)
    entries = store.entries(prefix, limit=MAX_FILES + 1)
    if not entries:
        raise InputError(
            f"there is nothing at {uri}", expected="a model in the layout of diffusers", action="check the URI"
        )
    _check_limits(entries, prefix)
    return store, prefix, entries


def digest_model(uri: str) -> tuple[FileDigest, ...]:
    """Return path, size and sha256 of every file of the model at `uri`, read piece by piece and never kept.

    Raises as `list_model` does.
    """
    store, prefix, entries = list_model(uri)
    digests = []
    for entry in entries:
        sha256, size = hashlib.sha256(), 0
        for chunk in store.read(entry.key):
            sha256.update(chunk)
            size += len(chunk)
            if size > entry.size:
                break
        if size != entry.size:
            raise _unsteady(entry)
        digests.append(FileDigest(path=entry.key.removeprefix(prefix), size=size, sha256=sha256.hexdigest()))
    return tuple(digests)


def _copy(uri: str, target: Path) -> None:
    """Bring the model's files to `target`."""
    store, prefix, entries = list_model(uri)
    for entry in entries:
        _download(store, entry, target / entry.key.removeprefix(prefix))


def _check_limits(entries: Sequence[Entry], prefix: str) -> None:
    check_count(len(entries))
    for entry in entries:
        check_name(entry.key.removeprefix(prefix))
    total = sum(entry.size for entry in entries)
    if total > MAX_TOTAL_BYTES:
        raise ModelRejectedError(
            f"the model has {total} bytes",
            expected=f"at most {MAX_TOTAL_BYTES} bytes",
            action="check that the URI names one model",
        )


def _download(store: ObjectStore, entry: Entry, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = entry.size
    with target.open("xb") as file:
        for chunk in store.read(entry.key):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left != 0:
        raise _unsteady(entry)


def _unsteady(entry: Entry) -> ModelRejectedError:
    return ModelRejectedError(
        f"{entry.key} is not of the size {entry.size} that was listed",
        expected="files that stay as they are while they are read",
        action="try again when nothing writes to the model",
    )
