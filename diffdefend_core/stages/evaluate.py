"""The evaluation stage: what the model paints before and, if it was repaired, after."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from diffdefend_core.artifacts import Action, AttackRow, Candidate, Metric, ModelRef, Scorecard
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import probing, steps_for, usual
from diffdefend_core.evaluation import (
    Backdoor,
    Extractor,
    Perceptual,
    Reference,
    check_counts,
    extractor,
    perceptual,
    plain_images,
    quality,
    success,
    success_curve,
    triggered_images,
)
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.backdoors import (
    by_other_samplers,
    known_backdoor,
    missing_kinds,
    probe_count,
    recovered_backdoor,
)
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_best
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow
from diffdefend_core.stages.reference_set import ReferenceSet, read_small, reference_set

STAGE = "evaluate"
FIRES = "fires"


@dataclass(frozen=True)
class Instruments:
    """What the evaluation measures with. `perceptual` is there where its weights were given."""

    extractor: Extractor
    perceptual: Perceptual | None
    reference: ReferenceSet
    known: bytes
    digests: dict[str, str]


@dataclass(frozen=True)
class Shot:
    """A backdoor that is fired `count` times with its sampler; `trigger` and `kind` as in `AttackRow`."""

    trigger: str
    kind: str
    backdoor: Backdoor
    count: int


@dataclass
class Side:
    """Metrics and pictures of one model; of each shot its metrics and its curve."""

    metrics: dict[str, Metric]
    pictures: dict[str, Tensor]
    attacks: list[tuple[dict[str, Metric], tuple[Metric, ...]]] = field(default_factory=list)


def evaluate(candidate_uri: str, *, settings: Settings, progress: Progress | None = None) -> str:
    """Return the URI of the folder with `scorecard.json` and the samples.

    Raises InputError at a wrong reference, extractor or number of samples, ModelRejectedError if the model paints NaN.
    """
    check_counts(settings.evaluation)
    candidate = read_record(Candidate, candidate_uri, "candidate")
    tools = _instruments(candidate, settings)

    def work(folder: Path) -> None:
        place = settings.device, settings.adapter
        before = fetch_denoiser(candidate.model_uri, *place)
        models = {"before": before}
        if candidate.action is Action.PURIFY:
            models["after"] = fetch_denoiser(candidate_uri, *place)
        with refusing_overflow():
            card, pictures = _measure(candidate, models, tools, settings, progress or silent)
        write_record(folder, "scorecard", card)
        samples = save({name: images.contiguous() for name, images in pictures.items()})
        (folder / "samples.safetensors").write_bytes(samples)

    return run_once(
        STAGE,
        store=settings.store,
        parents=(parent(candidate.action.value, candidate_uri), *tools.reference.parents),
        options={"evaluation": asdict(settings.evaluation), "inputs": tools.digests, "seed": settings.seed},
        work=work,
    )


def _instruments(candidate: Candidate, settings: Settings) -> Instruments:
    """Return what is measured with. Raises InputError before a model is opened."""
    options = settings.evaluation
    weights, backbone = read_small(options.extractor_weights), read_small(options.lpips_weights)
    known = read_small(options.known_trigger)
    # a folder of another model than the loaded one would be refused later: the reference is compared with this one
    chosen_reference = reference_set(read_record(ModelRef, candidate.model_uri, "model_ref"), settings)
    contents = {"extractor": weights, "lpips": backbone, "known": known}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return Instruments(
        extractor=extractor(options.extractor, weights, options.extractor_sha256),
        perceptual=perceptual(backbone, options.lpips_sha256) if backbone else None,
        reference=chosen_reference,
        known=known,
        digests={**digests, "reference": chosen_reference.digest},
    )


def _measure(
    candidate: Candidate, models: dict[str, Denoiser], tools: Instruments, settings: Settings, progress: Progress
) -> tuple[Scorecard, dict[str, Tensor]]:
    """Return the scorecard and the pictures of the model before and, if it was repaired, after."""
    before, options = models["before"], settings.evaluation
    reference, painted = tools.reference.make(before, tools.extractor, progress)
    shots = _shots(candidate, tools.known, before, settings, progress)
    sides = {name: _side(model, reference, shots, tools, settings, progress) for name, model in models.items()}
    spent = _plain_cost(before, options, painted) + sum(
        _plain_cost(model, options, options.samples) + _attack_cost(model, shots, options) for model in models.values()
    )
    if candidate.action is Action.PURIFY:
        spent += _probing_cost(before, settings)
    card = Scorecard(
        before=sides["before"].metrics,
        after=sides["after"].metrics if "after" in sides else None,
        attacks=_rows(shots, sides, before, options),
        extractor=tools.extractor.name,
        extractor_sha256=tools.extractor.sha256,
        reference=reference.name,
        self_reference=options.reference == "self",
        samplers={"plain": f"{usual(before).name} {steps_for(before, usual(before), options.sample_steps)}"}
        | {shot.trigger: shot.backdoor.sampler for shot in shots if shot.kind == FIRES},
        asr_threshold=options.asr_threshold,
        asr_thresholds=options.asr_thresholds,
        seed=settings.seed,
        forward_equivalents=spent,
        notes=_notes(before, reference, tools.extractor, bool(shots), options),
    )
    pictures = {f"{kind}/{name}": images for name, side in sides.items() for kind, images in side.pictures.items()}
    return card, pictures


def _shots(
    candidate: Candidate, known: bytes, model: Denoiser, settings: Settings, progress: Progress
) -> tuple[Shot, ...]:
    """Return what is fired: each backdoor with its own sampler and, less often, with one of each other kind."""
    options = settings.evaluation
    found: dict[str, Backdoor] = {}
    if candidate.action is Action.PURIFY:
        found["recovered"] = recovered_backdoor(read_best(candidate.trigger_uri), model, settings, progress)
    if options.known_trigger:
        found["known"] = known_backdoor(known, model, options.known_trigger)
    shots = []
    for name, backdoor in found.items():
        shots.append(Shot(name, FIRES, backdoor, options.triggered_samples))
        if options.other_samples:
            others = by_other_samplers(backdoor, model)
            shots += [Shot(name, kind, other, options.other_samples) for kind, other in others.items()]
    return tuple(shots)


def _side(
    model: Denoiser,
    reference: Reference,
    shots: tuple[Shot, ...],
    tools: Instruments,
    settings: Settings,
    progress: Progress,
) -> Side:
    options, seed = settings.evaluation, settings.seed
    plain = plain_images(model, options, seed + 3, progress)
    side = Side(
        metrics=quality(plain, reference, tools.extractor, options, seed),
        pictures={"plain": plain[: options.triggered_samples]},
    )
    for shot in shots:
        images = triggered_images(model, shot.backdoor, options, seed + 4, progress, shot.count)
        target = shot.backdoor.target.to(images)
        measured = success(images, target, options, seed, tools.perceptual)
        side.attacks.append((measured, success_curve(images, target, options.asr_thresholds)))
        if shot.kind == FIRES:
            ending = "" if shot.trigger == "recovered" else "_known"
            side.metrics |= {f"{metric}{ending}": value for metric, value in measured.items()}
            side.pictures[f"triggered{ending}"] = images
    return side


def _rows(
    shots: tuple[Shot, ...], sides: dict[str, Side], model: Denoiser, options: EvaluationOptions
) -> tuple[AttackRow, ...]:
    rows = []
    for number, shot in enumerate(shots):
        (before, curve_before), after = sides["before"].attacks[number], None
        curve_after: tuple[Metric, ...] = ()
        if "after" in sides:
            after, curve_after = sides["after"].attacks[number]
        rows.append(
            AttackRow(
                trigger=shot.trigger,
                sampler=shot.backdoor.sampler,
                kind=shot.kind,
                steps=shot.backdoor.steps(model, options),
                before=before,
                after=after,
                curve_before=curve_before,
                curve_after=curve_after,
            )
        )
    return tuple(rows)


def _notes(
    model: Denoiser, reference: Reference, chosen: Extractor, fired: bool, options: EvaluationOptions
) -> tuple[str, ...]:
    """Return what a reader of the numbers must know."""
    notes = []
    if reference.features is None:
        notes.append("The reference is a mean and a covariance: KID, precision and recall need features.")
    if options.samples <= chosen.dimensions:
        notes.append(
            f"FID of {options.samples} images with {chosen.dimensions} features is biased upwards: "
            "it compares only with others of as many images."
        )
    if fired and options.other_samples:
        notes.append(missing_kinds(model))
    return tuple(note for note in notes if note)


def _plain_cost(model: Denoiser, options: EvaluationOptions, images: int) -> int:
    entry = usual(model)
    return images * steps_for(model, entry, options.sample_steps) * entry.calls


def _attack_cost(model: Denoiser, shots: tuple[Shot, ...], options: EvaluationOptions) -> int:
    return sum(shot.count * shot.backdoor.calls * shot.backdoor.steps(model, options) for shot in shots)


def _probing_cost(model: Denoiser, settings: Settings) -> int:
    options = settings.evaluation
    steps = (
        entry.calls
        * steps_for(model, entry, options.stochastic_steps if entry.stochastic else options.deterministic_steps)
        for entry in probing(model)
    )
    return probe_count(settings) * sum(steps)
