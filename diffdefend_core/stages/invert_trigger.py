"""The inversion stage: search the model's trigger, found or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError
from diffdefend_core.inversion import Inversion
from diffdefend_core.io import folders
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.load import load
from diffdefend_core.stages.methods import chosen, search
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow

STAGE = "invert_trigger"
TRIGGER = "trigger.safetensors"


def invert_trigger(model_uri: str, *, settings: Settings, progress: Progress | None = None) -> str:
    """Return the URI of the folder with `inverted_trigger.json` and the shifts.

    Raises ModelRejectedError if the weights do not fit the configuration or the model's answers are not finite.
    """
    sources = [parent("load", model_uri)]
    model = read_record(ModelRef, model_uri, "model_ref")
    reference_uri = trusted_reference(model, settings)
    if reference_uri:
        sources.append(parent("load", reference_uri))

    def work(folder: Path) -> None:
        suspect = fetch_denoiser(model_uri, settings.device, settings.adapter)
        reference = fetch_denoiser(reference_uri, settings.device, settings.adapter) if reference_uri else None
        with refusing_overflow():
            found = search(
                suspect, model.digest, settings, seed=settings.seed, progress=progress or silent, reference=reference
            )
        write_inversion(folder, found)

    method = chosen(settings)
    options = {"method": method.name, "options": asdict(method.search_options(settings)), "seed": settings.seed}
    return run_once(STAGE, store=settings.store, parents=tuple(sources), options=options, work=work)


def trusted_reference(model: ModelRef, settings: Settings) -> str:
    """Return the URI of the loaded trusted reference that the settings name, or nothing.

    Raises InputError if it is the model itself, of another family or shape, or if the method has no use for it.
    """
    source = settings.inversion.reference
    if not source:
        return ""
    if chosen(settings).name != "diffdefend":
        raise InputError(
            f"--reference with the method {chosen(settings).name}",
            expected="the method diffdefend, the only one that uses one",
            action="leave out one of the two",
        )
    uri = load(source, settings=settings)
    reference = read_record(ModelRef, uri, "model_ref")
    if reference.digest == model.digest:
        raise InputError(
            "the reference is the model itself", expected="another model that you trust", action="name its clean parent"
        )
    if (reference.family, tuple(reference.shape)) != (model.family, tuple(model.shape)):
        raise InputError(
            f"the reference is {reference.family} {tuple(reference.shape)}",
            expected=f"{model.family} {tuple(model.shape)}, as the model",
            action="name another one, or none",
        )
    return uri


def write_inversion(folder: Path, found: Inversion) -> None:
    """Write the record and the shifts `tau/<name>` [C, H, W]."""
    write_record(folder, "inverted_trigger", found.record)
    save_file({f"tau/{name}": tau.cpu().contiguous() for name, tau in found.triggers.items()}, folder / TRIGGER)


def read_triggers(trigger_uri: str, folder: str = "") -> dict[str, Tensor]:
    """Return the verified shifts by candidate name [C, H, W], from a stage folder or from one (`name/`) inside it."""
    tensors = load_tensors(folders.read_file(trigger_uri, f"{folder}{TRIGGER}"))
    return {name.removeprefix("tau/"): tau for name, tau in tensors.items()}


def read_best(trigger_uri: str) -> Tensor:
    """Return the verified shift [C, H, W] of the strongest candidate."""
    return read_triggers(trigger_uri)[read_record(InvertedTrigger, trigger_uri, "inverted_trigger").best]
