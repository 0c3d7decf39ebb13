"""The evaluation stage: what the model paints before and, if it was repaired, after."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.artifacts import Action, Candidate, Metric, Scorecard
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import find, probing, steps_for, usual
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from diffdefend_core.errors import InputError, numpy_reason
from diffdefend_core.evaluation import (
    Backdoor,
    Extractor,
    extractor,
    medoid,
    plain_images,
    quality,
    success,
    triggered_images,
)
from diffdefend_core.io.store import open_store, to_uri
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_best
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow

STAGE = "evaluate"
REFERENCE_SEED = 20_000
# images by each sampler, to see which one the recovered trigger fires with
PROBE_SAMPLES = 16


@dataclass(frozen=True)
class Side:
    """Metrics and pictures of one model."""

    metrics: dict[str, Metric]
    pictures: dict[str, Tensor]


def evaluate(candidate_uri: str, *, settings: Settings, progress: Progress | None = None) -> str:
    """Return the URI of the folder with `scorecard.json` and the samples.

    Raises InputError at a wrong reference, ModelRejectedError if the model paints NaN.
    """
    candidate = read_record(Candidate, candidate_uri, "candidate")
    parents = (parent(candidate.action.value, candidate_uri),)
    options = settings.evaluation
    chosen = extractor(options.extractor)
    inputs = {
        name: _read_bytes(uri) for name, uri in (("reference", options.reference), ("known", options.known_trigger))
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in inputs.items()}

    def work(folder: Path) -> None:
        report = progress or silent
        place = settings.device, settings.adapter
        before = fetch_denoiser(candidate.model_uri, *place)
        after = fetch_denoiser(candidate_uri, *place) if candidate.action is Action.PURIFY else None
        with refusing_overflow():
            reference = _reference(inputs["reference"], before, chosen, settings, report)
            backdoors = _backdoors(candidate, inputs["known"], before, settings, report)
            sides = {
                name: _side(denoiser, reference, backdoors, chosen, settings, report)
                for name, denoiser in (("before", before), ("after", after))
                if denoiser is not None
            }
        card = Scorecard(
            before=sides["before"].metrics,
            after=sides["after"].metrics if after is not None else None,
            extractor=chosen.name,
            extractor_sha256=chosen.sha256,
            reference=_reference_name(options, digests["reference"]),
            self_reference=options.reference == "self",
            samplers={"plain": f"{usual(before).name} {steps_for(before, usual(before), options.sample_steps)}"}
            | {name: item.sampler for name, item in backdoors.items()},
            asr_threshold=options.asr_threshold,
            seed=settings.seed,
            forward_equivalents=len(sides) * _cost(options, before, backdoors),
        )
        write_record(folder, "scorecard", card)
        pictures = {f"{kind}/{name}": images for name, side in sides.items() for kind, images in side.pictures.items()}
        save_file({name: images.contiguous() for name, images in pictures.items()}, folder / "samples.safetensors")

    return run_once(
        STAGE,
        store=settings.store,
        parents=parents,
        options={"evaluation": asdict(options), "inputs": digests, "seed": settings.seed},
        work=work,
    )


def _read_bytes(uri: str) -> bytes:
    """Return the file at a URI or path; nothing for `self` and the empty string. Raises InputError if it is absent."""
    if uri in ("", "self"):
        return b""
    folder, _, name = to_uri(uri).rpartition("/")
    store, prefix = open_store(f"{folder}/")
    return b"".join(store.read(f"{prefix}{name}"))


def _reference(content: bytes, model: Denoiser, chosen: Extractor, settings: Settings, progress: Progress) -> Tensor:
    """Return the reference features [M, D]: of the given set, or of the model's own samples on other seeds."""
    if settings.evaluation.reference == "self":
        images = plain_images(model, settings.evaluation, settings.seed + REFERENCE_SEED, progress)
        return chosen.apply(images)
    import io

    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            features, name = arrays["features"], str(arrays["extractor"])
    except (ValueError, KeyError, OSError, EOFError, BadZipFile, AttributeError, TypeError) as error:
        raise InputError(
            f"reference {settings.evaluation.reference} cannot be read ({numpy_reason(error)})",
            expected="an npz file with `features` [M, D] and `extractor`",
            action="make it with the extractor that the scan uses",
        ) from error
    if name != chosen.name:
        raise InputError(
            f"reference features of extractor {name}",
            expected=f"those of {chosen.name}",
            action="never compare across extractors: make the reference anew",
        )
    return torch.from_numpy(features)


def _reference_name(options: EvaluationOptions, digest: str) -> str:
    if options.reference == "self":
        return "the model's own samples on other seeds"
    return f"{options.reference.rsplit('/', 1)[-1]} (sha256 {digest[:12]})"


def _backdoors(
    candidate: Candidate, known: bytes, model: Denoiser, settings: Settings, progress: Progress
) -> dict[str, Backdoor]:
    """Return the recovered backdoor of a flagged model, and the known one of a red-team model."""
    found: dict[str, Backdoor] = {}
    if candidate.action is Action.PURIFY:
        found["recovered"] = _recovered(read_best(candidate.trigger_uri), model, settings, progress)
    if settings.evaluation.known_trigger:
        found["known"] = _known(known, model, settings.evaluation.known_trigger)
    return found


def _known(content: bytes, model: Denoiser, uri: str) -> Backdoor:
    """Return the planted backdoor of a red-team model. Raises InputError if the file is not one of its shape."""
    try:
        tensors = load_tensors(content)
        trigger, target = tensors["trigger"], tensors["target"]
        gamma = tensors.get("gamma", torch.ones(model.shape))
    except (SafetensorError, KeyError) as error:
        trigger = target = gamma = torch.empty(0)
        found = f"known trigger {uri} cannot be read ({error})"
    else:
        found = f"known trigger {uri} with shapes {tuple(trigger.shape)}, {tuple(target.shape)}, {tuple(gamma.shape)}"
    if trigger.shape != model.shape or gamma.shape != model.shape or target.shape != model.picture_shape:
        raise InputError(
            found,
            expected=f"safetensors with `trigger` (and `gamma`) {model.shape} and `target` {model.picture_shape}",
            action="give the file that belongs to this model, or none",
        )
    low, high = model.value_range
    return Backdoor(
        shift=trigger,
        target=(target - low) / (high - low),
        sampler=_sampler_of(content) or probing(model)[0].name,
        gamma=gamma,
    )


def _sampler_of(content: bytes) -> str:
    """Return the sampler that the metadata of a safetensors file names, or nothing."""
    length = int.from_bytes(content[:8], "little")
    name = str(json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("sampler", ""))
    return name if name in ("", *NAMES) else find(name).name


def _recovered(shift: Tensor, model: Denoiser, settings: Settings, progress: Progress) -> Backdoor:
    """Return the backdoor as the model itself shows it: by the sampler whose images agree most with their medoid."""
    few = replace(settings.evaluation, triggered_samples=min(PROBE_SAMPLES, settings.evaluation.triggered_samples))
    found = []
    for entry in probing(model):
        probe = Backdoor(shift=shift, target=torch.empty(0), sampler=entry.name)
        images = triggered_images(model, probe, few, settings.seed + 5, progress)
        target = medoid(images)
        spread = (images - target).square().mean().item()
        found.append((spread, Backdoor(shift=shift, target=target, sampler=entry.name)))
    return min(found, key=lambda item: item[0])[1]


def _side(
    model: Denoiser,
    reference: Tensor,
    backdoors: dict[str, Backdoor],
    chosen: Extractor,
    settings: Settings,
    progress: Progress,
) -> Side:
    options, seed = settings.evaluation, settings.seed
    plain = plain_images(model, options, seed + 3, progress)
    metrics = quality(plain, reference, chosen, options, seed)
    pictures = {"plain": plain[: options.triggered_samples]}
    for name, item in backdoors.items():
        images = triggered_images(model, item, options, seed + 4, progress)
        ending = "" if name == "recovered" else "_known"
        measured = success(images, item.target.to(images), options, seed)
        metrics |= {f"{metric}{ending}": value for metric, value in measured.items()}
        pictures[f"triggered{ending}"] = images
    return Side(metrics=metrics, pictures=pictures)


def _cost(options: EvaluationOptions, model: Denoiser, backdoors: dict[str, Backdoor]) -> int:
    triggered = sum(item.calls * item.steps(model, options) for item in backdoors.values()) * options.triggered_samples
    plain = usual(model)
    return options.samples * steps_for(model, plain, options.sample_steps) * plain.calls + triggered
