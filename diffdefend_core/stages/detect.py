"""The detection stage: an inverted trigger in, a verdict out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from diffdefend_core.artifacts import InvertedTrigger, ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.io import folders
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.calibrations import read_calibration
from diffdefend_core.stages.candidate import descends
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_triggers
from diffdefend_core.stages.methods import chosen, judged, measured
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow

STAGE = "detect"


def detect(model_uri: str, trigger_uri: str, *, settings: Settings, progress: Progress | None = None) -> str:
    """Return the URI of the folder with `verdict.json` and the images painted with and without the found shift.

    Raises ArtifactError if the trigger is not one of this very model folder.
    """
    parents = (parent("load", model_uri), parent("invert_trigger", trigger_uri))
    model = read_record(ModelRef, model_uri, "model_ref")
    inverted = read_record(InvertedTrigger, trigger_uri, "inverted_trigger")
    descends(
        folders.finished(trigger_uri, "invert_trigger"), trigger_uri, folders.finished(model_uri, "load"), model_uri
    )
    calibration = read_calibration(settings)

    def work(folder: Path) -> None:
        suspect = fetch_denoiser(model_uri, settings.device, settings.adapter)
        triggers, seed = read_triggers(trigger_uri), settings.seed + 1
        with refusing_overflow():
            measurement = measured(suspect, inverted, triggers, settings, seed=seed, progress=progress or silent)
        verdict = judged(measurement, inverted, calibration, settings, model, suspect.kind)
        write_record(folder, "verdict", verdict)
        images = {"triggered": measurement.triggered.contiguous(), "plain": measurement.plain.contiguous()}
        save_file(images, folder / "samples.safetensors")

    options = {
        "detection": asdict(settings.detection),
        "measurement": chosen(settings).recorded(settings),
        "calibration": calibration.digest(),
        "seed": settings.seed,
    }
    return run_once(STAGE, store=settings.store, parents=parents, options=options, work=work)
