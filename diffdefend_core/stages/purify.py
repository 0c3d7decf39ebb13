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

from torch import Tensor

from diffdefend_core.artifacts import (
    Action,
    Candidate,
    InvertedTrigger,
    ModelRef,
    Parent,
    PurifiedModel,
    TriggerCandidate,
    Verdict,
    Word,
)
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.diffusion.training import UnfitStateError
from diffdefend_core.errors import InputError
from diffdefend_core.inversion import Inversion, own_samples
from diffdefend_core.inversion.attractors import ALIKE, SMALL_RMS, Attractors, attractors, in_less_noise, painting_most
from diffdefend_core.inversion.patch import in_patch, is_patch
from diffdefend_core.inversion.picture import led_again
from diffdefend_core.inversion.refine import ALL_NOISE, cosine
from diffdefend_core.io import folders
from diffdefend_core.io.folders import content_digest
from diffdefend_core.progress import Progress, silent
from diffdefend_core.purification import Removal, Repair, repair
from diffdefend_core.stages.calibrations import read_calibration
from diffdefend_core.stages.candidate import agree, scanned
from diffdefend_core.stages.checkpoint import Checkpoint
from diffdefend_core.stages.effects import Effects
from diffdefend_core.stages.folder import key_of, parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_triggers, trusted_reference, write_inversion
from diffdefend_core.stages.methods import chosen, judged, measured, search
from diffdefend_core.stages.model import (
    check_adapter,
    check_repairable,
    fetch_denoiser,
    fetched,
    open_denoiser,
    refusing_overflow,
    save_model,
)

STAGE, ROUND, RESCAN, SMALL = "purify", "purify_round", "rescan/", "small"
# a rescan draws from streams that no earlier scan of the model used
RESCAN_SEED = 10_000
# a shift breaks a law, and not only as any shift does, above this violation or this multiple of the control's parity
ORDINARY_VIOLATION, STANDING_OUT = 0.1, 1.5
# a shift that fires, or the best if none does, has so many times the rows of one that only breaks a law
MAIN_SHARE = 4
# what a shift turns to in less noise has so many times the rows
SIDE_SHARE = 2
# Where a shift is removed, by alpha / sigma. The noisy end alone is not enough: a network that takes the trigger for
# noise there hands it on to the levels below, where a deterministic sampler would paint the target after all. In less
# noise than that a suspect answers a trigger as a clean network does.
REMOVAL_SIGNALS = (0.005, 3.0)
# A consistency model has no levels below that it hands a trigger on to: it begins in the noisiest ones, and what comes
# after is begun with fresh noise.
REMOVAL_AT_ONCE = (0.005, 0.1)
# A trigger of a flow that leads to no single picture chooses among many: in much noise, where the little that is left
# of it decides. Above that the suspect with its trigger is nearer to a clean network than the goal.
REMOVAL_OF_CHOICE = (0.005, 0.3)
# How far beyond its goals a removal aims, as a share of what falls short of them: a first one, of triggers that
# deterministic samplers carry on from level to level, so that what is left at each adds up; one of triggers that choose
# among pictures; and a further round
AHEAD, OF_CHOICE, FURTHER = 0.1, 0.3, 1.0


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


@dataclass(frozen=True)
class Suspect:
    """The flagged model in `folder`, `samples` of its own [M, C, H, W], and what all rounds remove of it.

    Those are `shifts` [C, H, W], each as often as it counts, `further` of them triggers that the scan did not find;
    `effects` is what they do. They are `small` in all their shapes, or `sided`, or neither.
    """

    denoiser: Denoiser
    folder: Path
    samples: Tensor
    shifts: list[Tensor]
    effects: Effects
    small: bool
    sided: bool
    further: int
    forward_equivalents: int

    @property
    def chooses(self) -> bool:
        """Whether no shift of a flow leads to one picture: an attack that paints any picture of a class (D2D)."""
        return not self.effects.firing and not self.sided and self.denoiser.process == "flow"


@dataclass(frozen=True)
class Aims:
    """What one round removes, how far `beyond` its goals it aims, the pictures that it unlearns, whether it settles.

    `targets` [C, H, W] are clean x0: those of small triggers, and where `_pictured` says so.
    """

    removals: list[Removal]
    targets: tuple[Tensor, ...]
    beyond: float
    settles: bool


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
            return _suspect(task, opened.enter_context(fetched(task.model_uri, "model/")) / "model")

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
    aims = _aims(suspect, earlier)
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


def _suspect(task: Task, folder: Path) -> Suspect:
    """Return the model in `folder` and what is to be removed of it: what the scan found, and what else fires."""
    settings, options = task.settings, task.settings.purification
    best = read_record(InvertedTrigger, task.trigger_uri, "inverted_trigger").best
    denoiser = open_denoiser(folder, settings.device, settings.adapter)
    check_repairable(denoiser, folder, settings.adapter)
    samples = own_samples(denoiser, options.own_samples, options.own_steps, settings.seed + 2, task.progress)
    found = _once(_outstanding(task.trigger_uri), best)
    turned = attractors(denoiser, samples, settings.inversion, seed=settings.seed)
    others = _unlike(turned.shifts, found)
    effects = Effects.of(denoiser, found | others, settings)
    further = {name: shift for name, shift in others.items() if name in effects.firing}
    main, again = effects.firing or (best,), _led_again(denoiser, samples, effects, settings)
    shares = {name: MAIN_SHARE if name in main and not again else 1 for name in found}
    # the shifts that a scan finds are mostly one trigger in several shapes; a further one counts as much as all of them
    shares |= dict.fromkeys(further, MAIN_SHARE * max(1, sum(name in main for name in found)))
    shifts = [shift for name, shift in (found | further).items() for _ in range(shares[name])]
    shifts += [shift for item in again for shift in item.shifts for _ in range(MAIN_SHARE)]
    # what is left of a patch is its target, not a side of it
    turning = [shift for name, shift in (found | further).items() if name in main and not is_patch(shift)]
    sides = [in_less_noise(denoiser, samples, shift, settings.inversion, seed=settings.seed) for shift in turning]
    shifts += [shift for side in sides for shift in side.shifts for _ in range(SIDE_SHARE)]
    sided = bool(sides) and all(side.shifts for side in sides)  # the triggers of deterministic samplers have none
    small, tried = Attractors((), 0), Effects(settings)
    if turning and not sided and not effects.firing:  # a large shift may lead to one picture on both sides
        small = painting_most(denoiser, samples, turning[0], settings.inversion, seed=settings.seed)
        named = zip((SMALL,), small.shifts, strict=False)  # flows have none
        tried = Effects.of(denoiser, {name: SMALL_RMS * shift / rms(shift) for name, shift in named}, settings)
    if tried.firing:
        shifts += small.shifts * MAIN_SHARE
    effects = (effects + tried).and_of_weaker(denoiser, found | others)
    searched = sum(item.forward_equivalents for item in (turned, small, *sides, *again))
    return Suspect(
        denoiser=denoiser,
        folder=folder,
        samples=samples,
        shifts=shifts,
        effects=effects,
        small=bool(tried.firing),
        sided=sided,
        further=len(further),
        forward_equivalents=options.own_samples * options.own_steps + searched + effects.cost(denoiser),
    )


def _led_again(suspect: Denoiser, samples: Tensor, effects: Effects, settings: Settings) -> list[Attractors]:
    """Return for each picture that a shift of a consistency model leads to what other searches of it have in common."""
    if suspect.process != "consistency":
        return []
    pictures = effects.once().targets(suspect)
    return [
        led_again(suspect, samples, picture.to(samples), settings.inversion, seed=settings.seed + number)
        for number, picture in enumerate(pictures)
    ]


def _aims(suspect: Suspect, earlier: tuple[str, ...]) -> Aims:
    """Return what a round removes: that of all rounds, and what the rescans of earlier ones found."""
    pictured = suspect.small or _pictured(suspect.denoiser, suspect.effects, earlier)
    targets = suspect.effects.targets(suspect.denoiser) if pictured else ()
    shifts = suspect.shifts + [shift for uri in earlier for shift in _outstanding(uri, RESCAN).values()]
    # only a trigger of stochastic samplers may lie on another background
    kind = {"any_background": suspect.sided, "small": suspect.small}
    removals = [Removal(shift, _signals(suspect), **kind) for shift in shifts]
    return Aims(removals, targets, _beyond(suspect, earlier), not earlier and (bool(targets) or suspect.chooses))


def _beyond(suspect: Suspect, earlier: tuple[str, ...]) -> float:
    if earlier:
        return FURTHER
    if suspect.chooses:
        return OF_CHOICE
    return 0.0 if suspect.sided else AHEAD


def _signals(suspect: Suspect) -> tuple[float, float]:
    if suspect.denoiser.process == "consistency":
        return REMOVAL_AT_ONCE
    return REMOVAL_OF_CHOICE if suspect.chooses else REMOVAL_SIGNALS


def _pictured(suspect: Denoiser, effects: Effects, earlier: tuple[str, ...]) -> bool:
    """Whether the pictures of any trigger are unlearned: of flows, of one of any sampler, where a round was not enough.

    It takes rows from the triggers, and for most of them the images suffer without need.
    """
    left = bool(earlier) and not read_record(PurifiedModel, earlier[-1], "purified").is_silent
    return left or effects.by_any_sampler or suspect.process in ALL_NOISE


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


def _outstanding(uri: str, folder: str = "") -> dict[str, Tensor]:
    """Return the shifts [C, H, W] that break one of the two laws, by name; others would dilute the batch.

    The best one in any case, unless the search is that of a rescan, in `folder`.
    """
    found = read_record(InvertedTrigger, uri, f"{folder}inverted_trigger")
    triggers = read_triggers(uri, folder)
    names = [item.name for item in found.candidates if (item.name == found.best and not folder) or _stands_out(item)]
    return {name: triggers[name] for name in names}


def _once(found: dict[str, Tensor], best: str) -> dict[str, Tensor]:
    """Return the found shifts without those that are the best one, a patch, in other words: of it they know the place.

    They would take the rows of what is known better.
    """
    return {name: shift for name, shift in found.items() if name == best or not in_patch(shift, found[best])}


def _unlike(shifts: tuple[Tensor, ...], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shifts that are none of the found ones, by name."""
    return {
        f"further-{number}": shift
        for number, shift in enumerate(shifts, 1)
        if not any(cosine(shift, other) > ALIKE or in_patch(shift, other) for other in found.values())
    }


def _stands_out(item: TriggerCandidate) -> bool:
    return item.violation > ORDINARY_VIOLATION or item.parity > STANDING_OUT * item.control > 0


def _scan(
    denoiser: Denoiser, digest: str, task: Task, seed: int, reference: Denoiser | None = None
) -> tuple[Inversion, Verdict]:
    """Scan a model that is already in memory, as the first scan did."""
    settings, progress = task.settings, task.progress
    inversion = search(denoiser, digest, settings, seed=seed, progress=progress, reference=reference)
    measurement = measured(denoiser, inversion.record, inversion.triggers, settings, seed=seed + 1, progress=progress)
    return inversion, judged(measurement, inversion.record, task.calibration, settings, task.model, denoiser.kind)
