"""The purification stage: repair a flagged model until the same scan with new seeds finds nothing.

Each round is a stage folder of its own, so that a run that is killed goes on with the round that it was in, and within
it from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from diffdefend_core.artifacts import (
    Action,
    Candidate,
    InvertedTrigger,
    ModelRef,
    Parent,
    PurifiedModel,
    Verdict,
    Word,
)
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import UnfitStateError
from diffdefend_core.errors import InputError
from diffdefend_core.inversion import Inversion
from diffdefend_core.io import folders
from diffdefend_core.io.folders import content_digest
from diffdefend_core.progress import Progress, silent
from diffdefend_core.purification import Repair, repair
from diffdefend_core.stages.aims import RESCAN, Suspect, aims_of, suspect_in
from diffdefend_core.stages.calibrations import read_calibration
from diffdefend_core.stages.candidate import agree, scanned
from diffdefend_core.stages.checkpoint import Checkpoint
from diffdefend_core.stages.folder import key_of, parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import trusted_reference, write_inversion
from diffdefend_core.stages.methods import chosen, judged, measured, search
from diffdefend_core.stages.model import (
    check_adapter,
    fetch_denoiser,
    fetched,
    open_denoiser,
    refusing_overflow,
    save_model,
)

STAGE, ROUND = "purify", "purify_round"
# a rescan draws from streams that no earlier scan of the model used
RESCAN_SEED = 10_000


@dataclass(frozen=True)
class Task:
    """What all rounds of one repair share."""

    model: ModelRef
    model_uri: str
    trigger_uri: str
    reference_uri: str
    parents: tuple[Parent, ...]
    options: dict[str, Any]
    calibration: Calibration
    settings: Settings
    progress: Progress


def purify(
    model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings, progress: Progress | None = None
) -> str:
    """Return the URI of the folder with `candidate.json`, the repaired `model/`, and the scan of it in `rescan/`.

    The model is that of the round that left least.

    Raises InputError unless the verdict is backdoored: only flagged models are repaired. Also when an adapter's model
    could not be saved, and for the target r2 without a reference, or with one that the scan does not call clean.
    """
    parents = scanned(model_uri, trigger_uri, verdict_uri)
    model = read_record(ModelRef, model_uri, "model_ref")
    inverted = read_record(InvertedTrigger, trigger_uri, "inverted_trigger")
    verdict = read_record(Verdict, verdict_uri, "verdict")
    agree(model, inverted, verdict)
    if verdict.word is not Word.BACKDOORED:
        raise InputError(
            f"the verdict is {verdict.word}", expected="backdoored, to repair the model", action="keep or quarantine it"
        )
    check_adapter(model, settings.adapter)
    calibration, reference_uri = read_calibration(settings), _reference(model, settings)
    if reference_uri:
        parents += (parent("load", reference_uri),)
    task = Task(
        model=model,
        model_uri=model_uri,
        trigger_uri=trigger_uri,
        reference_uri=reference_uri,
        parents=parents,
        options=_recorded(calibration, settings),
        calibration=calibration,
        settings=settings,
        progress=progress or silent,
    )

    def work(folder: Path) -> None:
        rounds = _rounds(task)
        chosen_round, purified = _best_round(rounds)
        folders.fetch(chosen_round, folder)
        (folder / "purified.json").unlink()
        candidate = Candidate(
            action=Action.PURIFY,
            model_uri=model_uri,
            trigger_uri=trigger_uri,
            verdict_uri=verdict_uri,
            purified=purified,
        )
        write_record(folder, "candidate", candidate)

    return run_once(STAGE, store=settings.store, parents=parents, options=task.options, work=work)


def _recorded(calibration: Calibration, settings: Settings) -> dict[str, Any]:
    """Return all that a repair depends on beside its inputs."""
    options = {name: asdict(getattr(settings, name)) for name in ("inversion", "detection", "purification")}
    options["evaluation"] = asdict(settings.evaluation)
    method = chosen(settings).recorded(settings)
    return {**options, "method": method, "calibration": calibration.digest(), "seed": settings.seed}


def _reference(model: ModelRef, settings: Settings) -> str:
    """Return the URI of the loaded trusted reference, or nothing. Raises InputError if the target r2 has none."""
    uri = trusted_reference(model, settings)
    if settings.purification.target == "r2" and not uri:
        raise InputError(
            "purification.target r2 without a reference",
            expected="inversion.reference, the clean model whose answers are copied",
            action="name one with --reference, or use the target r4",
        )
    return uri


def _rounds(task: Task) -> list[str]:
    """Repair, save and rescan until the rescan is clean and no found shift fires, or the rounds are used up.

    Return the URIs of the rounds.
    """
    done: list[str] = []
    with ExitStack() as opened:

        @cache
        def suspect() -> Suspect:  # asked once, by the first round that is not done yet
            folder = opened.enter_context(fetched(task.model_uri, "model/")) / "model"
            return suspect_in(folder, task.trigger_uri, task.settings, task.progress)

        for number in range(1, task.settings.purification.rounds + 1):
            previous = (parent(ROUND, done[-1]),) if done else ()
            parents, options = task.parents + previous, {**task.options, "round": number}

            def work(folder: Path, number: int = number, key: str = key_of(ROUND, parents, options)) -> None:
                with refusing_overflow():
                    reference = _trusted_reference(task)  # refused before anything is asked of the suspect
                    checkpoint = Checkpoint(task.settings.store, key)
                    _round(task, suspect(), reference, number, tuple(done), checkpoint, folder)

            done.append(run_once(ROUND, store=task.settings.store, parents=parents, options=options, work=work))
            purified = read_record(PurifiedModel, done[-1], "purified")
            if purified.rescan.word is Word.CLEAN and purified.is_silent:
                break
    return done


def _best_round(rounds: list[str]) -> tuple[str, PurifiedModel]:
    """Return the URI of the round that left least, and its record with the evaluations of all.

    A later round is not always a better one. What a shift still paints counts before what a scan suspects; of rounds
    that are alike in both the earlier one changed less of the model.
    """
    records = [read_record(PurifiedModel, uri, "purified") for uri in rounds]
    best = min(range(len(rounds)), key=lambda number: _left(records[number]))
    spent = records[-1].forward_equivalents
    return rounds[best], replace(records[best], rounds_tried=len(rounds), forward_equivalents=spent)


def _left(purified: PurifiedModel) -> tuple[float, int, float]:
    """Return what a round left, in the order in which it counts."""
    rescan = purified.rescan
    fires = 0.0 if purified.is_silent else purified.still_fires or 0.0
    return fires, (Word.CLEAN, Word.INCONCLUSIVE, Word.BACKDOORED).index(rescan.word), rescan.probability


def _round(
    task: Task,
    suspect: Suspect,
    reference: Denoiser | None,
    number: int,
    earlier: tuple[str, ...],
    checkpoint: Checkpoint,
    folder: Path,
) -> None:
    """Fill the folder of one round: train, save, and scan what was saved.

    Where pictures are unlearned, or a choice among them, the first one settles. What settles answers a little more
    evenly again, and a later round is there because too much was left.
    """
    settings, options, progress = task.settings, task.settings.purification, task.progress
    aims = aims_of(suspect, earlier)
    settled = options.settling if aims.settles else 0.0
    train = partial(
        repair,
        fetch_denoiser(earlier[-1], settings.device, settings.adapter) if earlier else suspect.denoiser,
        suspect.denoiser,
        aims.removals,
        suspect.effects.without_targets(suspect.denoiser, suspect.samples),
        replace(options, steps=options.steps * (1 + suspect.further), settling=settled),
        seed=settings.seed + number,
        progress=partial(progress, f"purification, round {number}"),
        reference=reference,
        targets=aims.targets,
        beyond=aims.beyond,
        in_noise=aims.in_noise,
        keep=checkpoint.write,
    )
    repaired = _resumed(train, checkpoint)
    contents = save_model(repaired.denoiser, suspect.folder, folder / "model", settings.adapter)
    saved = open_denoiser(folder / "model", settings.device, settings.adapter)
    digest = content_digest(contents.files)
    inversion, verdict = _scan(saved, digest, task, settings.seed + number * RESCAN_SEED, reference)
    still_fires, fired = suspect.effects.left(saved)
    spent = repaired.forward_equivalents + verdict.forward_equivalents + fired
    before = suspect.forward_equivalents
    if earlier:
        before = read_record(PurifiedModel, earlier[-1], "purified").forward_equivalents
    purified = PurifiedModel(
        digest=digest,
        parent_digest=task.model.digest,
        rounds=number,
        removal_loss=repaired.removal_loss,
        retention_loss=repaired.retention_loss,
        rescan=verdict,
        weights_sha256=contents.weights_sha256,
        forward_equivalents=before + spent,
        still_fires=still_fires,
        further_triggers=suspect.further,
        rounds_tried=number,
    )
    write_record(folder, "purified", purified)
    (folder / RESCAN).mkdir()
    write_inversion(folder / RESCAN, inversion)


def _resumed(train: Callable[..., Repair], checkpoint: Checkpoint) -> Repair:
    """Train on from the checkpoint, and from the start if there is none or it is of no use."""
    try:
        return train(resumed=checkpoint.read())
    except UnfitStateError as error:
        checkpoint.dismiss(str(error))
    return train()


def _trusted_reference(task: Task) -> Denoiser | None:
    """Return the reference, if there is one. Raises InputError unless its own scan calls it clean."""
    if not task.reference_uri:
        return None
    reference = fetch_denoiser(task.reference_uri, task.settings.device, task.settings.adapter)
    if task.settings.purification.target != "r2":
        return reference
    digest = read_record(ModelRef, task.reference_uri, "model_ref").digest
    _, verdict = _scan(reference, digest, task, task.settings.seed)
    if verdict.word is not Word.CLEAN:
        raise InputError(
            f"the scan of the reference says {verdict.word}, probability {verdict.probability:.3g}",
            expected="clean: the target r2 copies its answers",
            action="name another reference, or use the target r4",
        )
    return reference


def _scan(
    denoiser: Denoiser, digest: str, task: Task, seed: int, reference: Denoiser | None = None
) -> tuple[Inversion, Verdict]:
    """Scan a model that is already in memory, as the first scan did."""
    settings, progress = task.settings, task.progress
    inversion = search(denoiser, digest, settings, seed=seed, progress=progress, reference=reference)
    measurement = measured(denoiser, inversion.record, inversion.triggers, settings, seed=seed + 1, progress=progress)
    return inversion, judged(measurement, inversion.record, task.calibration, settings, task.model, denoiser.kind)
