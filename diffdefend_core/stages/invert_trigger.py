"""The inversion stage: search the model's trigger, found or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.inversion import Inversion, invert
from diffdefend_core.io import folders
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow

STAGE = "invert_trigger"
TRIGGER, REFERENCE = "trigger.safetensors", "reference.safetensors"


def invert_trigger(model_uri: str, *, settings: Settings, progress: Progress | None = None) -> str:
    """Return the URI of the folder with `inverted_trigger.json`, the shifts, and the weights of the forgetful twin.

    Raises ModelRejectedError if the weights do not fit the configuration or the model's answers are not finite.
    """
    source = parent("load", model_uri)
    model = read_record(ModelRef, model_uri, "model_ref")

    def work(folder: Path) -> None:
        suspect = fetch_denoiser(model_uri, settings.device, settings.adapter)
        with refusing_overflow():
            found = invert(suspect, model.digest, settings.inversion, seed=settings.seed, progress=progress or silent)
        write_inversion(folder, found)

    options = {"inversion": asdict(settings.inversion), "seed": settings.seed}
    return run_once(STAGE, store=settings.store, parents=(source,), options=options, work=work)


def write_inversion(folder: Path, found: Inversion) -> None:
    """Write the record, the shifts `tau/<name>` [C, H, W] and the twin's weights."""
    write_record(folder, "inverted_trigger", found.record)
    save_file({f"tau/{name}": tau.cpu().contiguous() for name, tau in found.triggers.items()}, folder / TRIGGER)
    weights = {name: value.cpu().contiguous() for name, value in found.reference.network.state_dict().items()}
    save_file(weights, folder / REFERENCE)


def read_triggers(trigger_uri: str) -> dict[str, Tensor]:
    """Return the verified shifts by candidate name [C, H, W]."""
    tensors = load_tensors(folders.read_file(trigger_uri, TRIGGER))
    return {name.removeprefix("tau/"): tau for name, tau in tensors.items()}


def read_best(trigger_uri: str) -> Tensor:
    """Return the verified shift [C, H, W] of the strongest candidate."""
    return read_triggers(trigger_uri)[read_record(InvertedTrigger, trigger_uri, "inverted_trigger").best]


def read_reference(trigger_uri: str, suspect: Denoiser) -> Denoiser:
    """Return the forgetful twin of `suspect` with its verified weights."""
    twin = suspect.clone()
    twin.network.load_state_dict(load_tensors(folders.read_file(trigger_uri, REFERENCE)))
    return twin.freeze()
