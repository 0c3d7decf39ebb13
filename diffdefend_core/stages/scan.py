"""Load, invert and detect in one process: what `diffdefend scan` does."""

from __future__ import annotations

from diffdefend_core.artifacts import InvertedTrigger, ModelRef, Verdict
from diffdefend_core.config import Settings
from diffdefend_core.progress import Progress
from diffdefend_core.stages.calibrations import read_calibration
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.load import load


def scan(
    source: str, *, settings: Settings, name: str | None = None, progress: Progress | None = None
) -> tuple[str, str, str]:
    """Return the URIs of the folders of the model, its inverted trigger and the verdict. Raises as the stages do."""
    read_calibration(settings)  # refused now rather than after the search
    model_uri = load(source, settings=settings, name=name)
    trigger_uri = invert_trigger(model_uri, settings=settings, progress=progress)
    return model_uri, trigger_uri, detect(model_uri, trigger_uri, settings=settings, progress=progress)


def read(model_uri: str, trigger_uri: str, verdict_uri: str) -> tuple[ModelRef, InvertedTrigger, Verdict]:
    """Return the records in the three folders. Raises ArtifactError."""
    return (
        read_record(ModelRef, model_uri, "model_ref"),
        read_record(InvertedTrigger, trigger_uri, "inverted_trigger"),
        read_record(Verdict, verdict_uri, "verdict"),
    )
