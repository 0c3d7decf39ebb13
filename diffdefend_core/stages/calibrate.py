"""Calibration of a team's own clean models: what is ordinary there, for `detection.calibration` to name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdefend_core.artifacts import InvertedTrigger, ModelRef, Word
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.detection.calibration import RELATED_FLOOR, standardise
from diffdefend_core.detection.decide import decide
from diffdefend_core.errors import InputError
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import invert_trigger, read_triggers
from diffdefend_core.stages.load import load
from diffdefend_core.stages.methods import chosen, measured
from diffdefend_core.stages.model import fetch_denoiser

STAGE = "calibrate"


@dataclass(frozen=True)
class Held:
    """What the others say of one model of a calibration: the word without it, and the score behind that."""

    name: str
    word: Word
    probability: float


def calibrate(sources: Sequence[str], *, name: str, settings: Settings, progress: Progress | None = None) -> str:
    """Measure clean models by the steps of a scan; return the URI of the folder with `calibration.json`.

    Raises InputError for fewer than two models, two of the same content, or models of different families or shapes:
    a calibration speaks of one kind.
    """
    if len(sources) < 2:
        raise InputError(
            f"{len(sources)} clean model", expected="at least two, 8 for a verdict of clean", action="name more models"
        )
    report = progress or silent
    model_uris = [load(source, settings=settings) for source in sources]
    models = [read_record(ModelRef, uri, "model_ref") for uri in model_uris]
    _check(models)
    trigger_uris = []
    for number, uri in enumerate(model_uris):
        report("clean models", number, len(sources))
        trigger_uris.append(invert_trigger(uri, settings=settings, progress=report))

    def work(folder: Path) -> None:
        measured = tuple(
            _measured(model, model_uri, trigger_uri, settings, report)
            for model, model_uri, trigger_uri in zip(models, model_uris, trigger_uris, strict=True)
        )
        write_record(
            folder,
            "calibration",
            Calibration(name=name, options_digest=chosen(settings).digest(settings), models=measured),
        )

    parents = tuple(parent("invert_trigger", uri) for uri in trigger_uris)
    options = {"name": name, "options": chosen(settings).digest(settings), "seed": settings.seed}
    return run_once(STAGE, store=settings.store, parents=parents, options=options, work=work)


def held_out(calibration: Calibration, settings: Settings) -> list[Held]:
    """Return what a calibration says of each of its own models when that one is left out."""
    limit, score = settings.detection.limit, chosen(settings).score
    found = []
    for model in calibration.models:
        others = calibration.without(model.digest)
        kin, floor = others.kin(model.family, model.shape, model.process)
        statistics = standardise(kin or others.models, model.statistics, limit, min(floor, RELATED_FLOOR))
        word, chance, _ = decide(statistics, limit=limit, basis="the others", covered=bool(kin), score=score)
        found.append(Held(model.name, word, chance))
    return found


def _measured(model: ModelRef, model_uri: str, trigger_uri: str, settings: Settings, progress: Progress) -> CleanModel:
    suspect = fetch_denoiser(model_uri, settings.device, settings.adapter)
    measurement = measured(
        suspect,
        read_record(InvertedTrigger, trigger_uri, "inverted_trigger"),
        read_triggers(trigger_uri),
        settings,
        seed=settings.seed + 1,
        progress=progress,
    )
    return CleanModel(
        name=model.name,
        digest=model.digest,
        family=model.family,
        process=suspect.kind,
        shape=tuple(model.shape),
        statistics=measurement.statistics,
    )


def _check(models: Sequence[ModelRef]) -> None:
    kinds = {(model.family, tuple(model.shape)) for model in models}
    if len(kinds) > 1:
        shown = ", ".join(f"{family} {shape}" for family, shape in sorted(kinds))
        raise InputError(f"models of {shown}", expected="one family and shape", action="make one calibration for each")
    names: dict[str, str] = {}
    for model in models:
        if model.digest in names:
            raise InputError(
                f"{names[model.digest]} and {model.name} are the same model",
                expected="different clean models",
                action="name each model once",
            )
        names[model.digest] = model.name
