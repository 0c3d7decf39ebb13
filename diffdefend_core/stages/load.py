"""The load stage: take a model from wherever it is, check it without running it, and give it an address. No torch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from diffdefend_core.artifacts import FileDigest, ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.adapters import call_adapter, describe
from diffdefend_core.loading.adapters import origin as adapter_origin
from diffdefend_core.loading.pickles import convert_pickles, finding_of
from diffdefend_core.loading.static import Inspection, inspect_contents, inspect_folder
from diffdefend_core.stages.folder import run_once, write_record
from diffdefend_core.stages.source import Origin, bring, find

STAGE = "load"
ADAPTED = "adapter "


def load(source: str, *, settings: Settings, name: str | None = None) -> str:
    """Check the model at `source` and return the URI of its load folder: `model_ref.json` and `model/`.

    `source` is a folder, a `file://` or `s3://` URI, `hf://organisation/name@commit`, or `models:/name/version` or
    `models:/name@alias`. With `settings.allow_pickles` those of torch are checked and saved anew as safetensors. With
    `settings.adapter` the layout is that of the adapter, which builds the model once. Raises InputError when there is
    nothing or the adapter fails, ModelRejectedError when the model may not be loaded, StoreError, RegistryError.
    """
    origin = find(source, name, settings)
    with tempfile.TemporaryDirectory(prefix="diffdefend-source-") as scratch:
        model = Path(scratch) / "model"
        remarks = bring(origin.uri, model, settings)
        pickles = convert_pickles(model) if settings.allow_pickles else ()
        reference = _reference(source, origin, model, settings.adapter, pickles, remarks)

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


def _reference(
    source: str, origin: Origin, folder: Path, adapter: str, pickles: tuple[FileDigest, ...], remarks: tuple[str, ...]
) -> ModelRef:
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
        findings=(*map(finding_of, pickles), *remarks, *findings),
        pickles=pickles,
    )
