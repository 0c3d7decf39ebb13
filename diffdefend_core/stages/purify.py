"""The purification stage: repair a flagged model until the same scan with new seeds finds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffdefend_core.artifacts import Action, Candidate, InvertedTrigger, ModelRef, PurifiedModel, Verdict, Word
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError
from diffdefend_core.inversion import Inversion, own_samples
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.static import Contents
from diffdefend_core.progress import Progress, silent
from diffdefend_core.purification import Repair, repair
from diffdefend_core.stages.calibrations import read_calibration
from diffdefend_core.stages.candidate import agree
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_triggers, write_inversion
from diffdefend_core.stages.methods import chosen, judged, measured, search
from diffdefend_core.stages.model import (
    check_adapter,
    check_repairable,
    fetched,
    open_denoiser,
    refusing_overflow,
    save_model,
)

STAGE = "purify"
# a rescan draws from streams that no earlier scan of the model used
RESCAN_SEED = 10_000
# a shift breaks a law, and not only as any shift does, above this violation or this multiple of the control's parity
ORDINARY_VIOLATION, STANDING_OUT = 0.1, 1.5


@dataclass(frozen=True)
class Round:
    """What one round left: the repair, its saved model, and the scan of that model with new seeds."""

    repair: Repair
    contents: Contents
    inversion: Inversion
    verdict: Verdict


def purify(
    model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings, progress: Progress | None = None
) -> str:
    """Return the URI of the folder with `candidate.json`, the repaired `model/`, and the last scan of it in `rescan/`.

    Raises InputError unless the verdict is backdoored: only flagged models are repaired. Also when an adapter's model
    could not be saved.
    """
    parents = (parent("load", model_uri), parent("invert_trigger", trigger_uri), parent("detect", verdict_uri))
    model = read_record(ModelRef, model_uri, "model_ref")
    inverted = read_record(InvertedTrigger, trigger_uri, "inverted_trigger")
    verdict = read_record(Verdict, verdict_uri, "verdict")
    agree(model, inverted, verdict)
    if verdict.word is not Word.BACKDOORED:
        raise InputError(
            f"the verdict is {verdict.word}", expected="backdoored, to repair the model", action="keep or quarantine it"
        )
    check_adapter(model, settings.adapter)
    calibration = read_calibration(settings)

    def work(folder: Path) -> None:
        with fetched(model_uri, "model/") as source, refusing_overflow():
            places = source / "model", folder / "model"
            rounds = list(_rounds(*places, model, trigger_uri, calibration, settings, progress or silent))
        candidate = Candidate(
            action=Action.PURIFY,
            model_uri=model_uri,
            trigger_uri=trigger_uri,
            verdict_uri=verdict_uri,
            purified=_purified(model, rounds, settings),
        )
        write_record(folder, "candidate", candidate)
        (folder / "rescan").mkdir()
        write_inversion(folder / "rescan", rounds[-1].inversion)

    options = {name: asdict(getattr(settings, name)) for name in ("inversion", "detection", "purification")}
    seeded = {
        **options,
        "method": chosen(settings).recorded(settings),
        "calibration": calibration.digest(),
        "seed": settings.seed,
    }
    return run_once(STAGE, store=settings.store, parents=parents, options=seeded, work=work)


def _purified(model: ModelRef, rounds: list[Round], settings: Settings) -> PurifiedModel:
    last, options = rounds[-1], settings.purification
    spent = sum(item.repair.forward_equivalents + item.verdict.forward_equivalents for item in rounds)
    return PurifiedModel(
        digest=content_digest(last.contents.files),
        parent_digest=model.digest,
        rounds=len(rounds),
        removal_loss=last.repair.removal_loss,
        retention_loss=last.repair.retention_loss,
        rescan=last.verdict,
        weights_sha256=last.contents.weights_sha256,
        forward_equivalents=spent + options.own_samples * options.own_steps,
    )


def _rounds(
    source: Path,
    target: Path,
    model: ModelRef,
    trigger_uri: str,
    calibration: Calibration,
    settings: Settings,
    progress: Progress,
) -> Iterator[Round]:
    """Repair, save and rescan until the rescan is clean or the rounds are used up; yield every round.

    A round that is not clean adds the shifts that its rescan found: each further round knows more of the backdoor.
    """
    options = settings.purification
    suspect = open_denoiser(source, settings.device, settings.adapter)
    check_repairable(suspect, source, settings.adapter)
    samples = own_samples(suspect, options.own_samples, options.own_steps, settings.seed + 2, progress)
    found = read_record(InvertedTrigger, trigger_uri, "inverted_trigger")
    triggers = _worth_removing(found, read_triggers(trigger_uri))
    current = suspect
    for number in range(1, options.rounds + 1):
        repaired = repair(
            current,
            suspect,
            torch.stack(triggers),
            samples,
            options,
            seed=settings.seed + number,
            progress=partial(progress, f"purification, round {number}"),
        )
        contents = save_model(repaired.denoiser, source, target, settings.adapter)
        current = open_denoiser(target, settings.device, settings.adapter)
        digest = content_digest(contents.files)
        inversion, verdict = _rescan(current, digest, model, calibration, settings, number, progress)
        yield Round(repair=repaired, contents=contents, inversion=inversion, verdict=verdict)
        if verdict.word is Word.CLEAN:
            return
        triggers += _worth_removing(inversion.record, inversion.triggers)


def _worth_removing(found: InvertedTrigger, triggers: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the shifts that break one of the two laws, and the best in any case; others would dilute the batch."""
    return [
        triggers[item.name]
        for item in found.candidates
        if item.name == found.best
        or item.violation > ORDINARY_VIOLATION
        or item.parity > STANDING_OUT * item.control > 0
    ]


def _rescan(
    denoiser: Denoiser,
    digest: str,
    model: ModelRef,
    calibration: Calibration,
    settings: Settings,
    number: int,
    progress: Progress,
) -> tuple[Inversion, Verdict]:
    """Scan the saved bytes of a repaired model, with seeds that no earlier scan of it used."""
    seed = settings.seed + number * RESCAN_SEED
    inversion = search(denoiser, digest, settings, seed=seed, progress=progress)
    measurement = measured(denoiser, inversion.record, inversion.triggers, settings, seed=seed + 1, progress=progress)
    return inversion, judged(measurement, inversion.record, calibration, settings, model, denoiser.kind)
