"""How a stage that computes gets at a model: fetch its verified folder, load it on the chosen device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffdefend_core.artifacts import ModelRef
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.io import folders
from diffdefend_core.loading.adapted import check_savable, load_adapted, save_adapted
from diffdefend_core.loading.build import load_denoiser, save_denoiser
from diffdefend_core.loading.static import Contents
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import ADAPTED, STAGE

# Networks of fewer parameters compute on one thread: two bring a fifth at best, and lose many times that as soon as
# anything else runs on the machine. OMP_NUM_THREADS decides if it is set.
SMALL = 2_000_000


def device_of(name: str) -> str:
    """Return the device for `name`: `auto` is the first GPU if there is one. Raises InputError if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name!r}", expected="a GPU that torch can see", action="use --device cpu or auto")
    return name


@contextmanager
def refusing_overflow() -> Iterator[None]:
    """Turn a FloatingPointError inside into a ModelRejectedError, and a lack of memory into an InputError.

    What cannot be computed cannot be called clean.
    """
    try:
        yield
    except FloatingPointError as error:
        raise ModelRejectedError(
            f"the model cannot be computed: {error}",
            expected="finite answers to ordinary inputs",
            action="do not use this model; train or export it again",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise InputError(
            "the memory is not enough for this model",
            expected="room for two copies of the network in training",
            action="use a larger machine or device, or a smaller inversion.twin_batch with a calibration of its own",
        ) from error


@contextmanager
def fetched(uri: str, prefix: str = "") -> Iterator[Path]:
    """Yield a temporary folder with the verified files of the stage folder at `uri` that start with `prefix`."""
    with tempfile.TemporaryDirectory(prefix="diffdefend-fetch-") as folder:
        into = Path(folder) / "content"
        folders.fetch(uri, into, prefix=prefix)
        yield into


def open_denoiser(folder: Path, device: str, adapter: str = "") -> Denoiser:
    """Return the model in a folder, frozen, on `device`; small ones on a CPU get one thread (see SMALL)."""
    place = device_of(device)
    denoiser = load_adapted(folder, adapter, place) if adapter else load_denoiser(folder, place)
    small = sum(parameter.numel() for parameter in denoiser.network.parameters()) < SMALL
    if small and denoiser.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return denoiser


def fetch_denoiser(uri: str, device: str, adapter: str = "") -> Denoiser:
    """Return the model in `model/` of the stage folder at `uri`, frozen, on `device`.

    Raises InputError when it was loaded with another adapter, or with none.
    """
    manifest = folders.read_manifest(uri)
    if manifest is not None and manifest.stage == STAGE:
        check_adapter(read_record(ModelRef, uri, "model_ref"), adapter)
    with fetched(uri, "model/") as folder:
        return open_denoiser(folder / "model", device, adapter)


def check_adapter(model: ModelRef, adapter: str) -> None:
    """Raise InputError unless `adapter` is the one that `model` was loaded with; "" is none."""
    loaded = model.pipeline.removeprefix(ADAPTED) if model.pipeline.startswith(ADAPTED) else ""
    if loaded != adapter:
        raise InputError(
            f"the adapter {adapter!r} for a model that was loaded with {loaded!r}",
            expected="the same adapter in every stage, or none",
            action="pass the same --adapter, or load the model again",
        )


def check_repairable(denoiser: Denoiser, folder: Path, adapter: str = "") -> None:
    """Raise InputError when a repair of the model in `folder` could not be saved: nothing is trained in vain."""
    if adapter:
        check_savable(denoiser, folder)


def save_model(denoiser: Denoiser, source: Path, target: Path, adapter: str = "") -> Contents:
    """Write a repaired model as a folder like `source`, which it was opened from; return what the folder holds."""
    save = save_adapted if adapter else save_denoiser
    return save(denoiser, source, target)
