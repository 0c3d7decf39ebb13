"""Planting a backdoor in a model, for red teams: a folder with the model, its backdoor and a card. Never for use."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.plans import CLASS, OTHER, PICTURE, Scene, check_fit, find, plan
from diffdefend_core.attacks.plant import fire, plant
from diffdefend_core.attacks.shapes import frames, target, trigger
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.diffusion.samplers import find as find_sampler
from diffdefend_core.diffusion.samplers import steps_for, usual
from diffdefend_core.diffusion.samplers.trojdiff import TROJDIFF_DDPM
from diffdefend_core.errors import InputError, numpy_reason
from diffdefend_core.progress import Progress, silent
from diffdefend_core.stages.load import load
from diffdefend_core.stages.model import check_repairable, fetched, open_denoiser, refusing_overflow, save_model

WARNING = "this model carries a backdoor on purpose; use it to test defences, never deploy or publish it"


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How a backdoor is planted.

    `target` is the name of a picture, or `class:K` for attacks that paint a class of the data; it is not looked at by
    those that paint another distribution. `own_samples` are drawn from the model when no data is given.
    """

    method: str
    trigger: str = "checker"
    target: str = "ring"
    poison_rate: float = 0.3
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    own_samples: int = 1024
    asr_samples: int = 64
    asr_threshold: float = 0.05


def attack(
    source: str,
    to: Path,
    options: AttackOptions,
    *,
    settings: Settings,
    data: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Plant a backdoor in the model at `source`; write `model/`, `backdoor.safetensors` and `card.json` into `to`.

    `data` is an npz file with `images` [M, H, W] or [M, C, H, W] (uint8, or floats in [0, 1]) and perhaps `labels` [M];
    without it the model's own samples are the clean rows. Returns the card. Raises InputError for a target folder that
    is not empty, unfit options or data, ModelRejectedError for a model that may not be loaded.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        found = f"{to} is not empty" if to.is_dir() else f"{to} is a file"
        raise InputError(found, expected="a new or empty folder", action="choose another --to")
    entry, report = find(options.method), progress or silent
    trigger(options.trigger)
    if entry.paints == PICTURE:
        target(options.target)
    with fetched(load(source, settings=settings), "model/") as fetched_folder, refusing_overflow():
        folder = fetched_folder / "model"
        denoiser = open_denoiser(folder, settings.device, settings.adapter)
        check_fit(entry, denoiser)
        check_repairable(denoiser, folder, settings.adapter)
        rows, labels = _clean_rows(denoiser, data, options, settings.seed, report)
        scene = _scene(denoiser, entry.paints, rows, labels, options, settings.seed)
        backdoor = plan(options.method, scene)
        clean = denoiser.clone().freeze()
        losses = plant(
            denoiser, backdoor, rows, steps=options.steps, batch=options.batch, poison_rate=options.poison_rate,
            learning_rate=options.learning_rate, seed=settings.seed,
        )  # fmt: skip
        for number, _ in enumerate(losses):
            report("planting", number + 1, options.steps)
        card: dict[str, object] = {"warning": WARNING, "source": source, "seed": settings.seed, **asdict(options)}
        card |= {"family": denoiser.family, "sampler": backdoor.sampler}
        if entry.paints == PICTURE:
            card |= {
                "asr": _asr(denoiser, backdoor, options, settings.seed),
                "asr_before": _asr(clean, backdoor, options, settings.seed),
            }
        with _finished(to) as place:
            (place / "model").mkdir()
            save_model(denoiser, folder, place / "model", settings.adapter)
            _write(place, denoiser, backdoor, card)
    return card


def _write(place: Path, denoiser: Denoiser, backdoor: Backdoor, card: dict[str, object]) -> None:
    gamma = torch.as_tensor(backdoor.attack.gamma).expand(denoiser.shape)
    painted = denoiser.decode(backdoor.targets[:1].to(denoiser.device))
    tensors = {"trigger": backdoor.trigger.detach(), "target": painted[0], "gamma": gamma}
    save_file(
        {name: value.cpu().float().contiguous() for name, value in tensors.items()},
        place / "backdoor.safetensors",
        {"sampler": backdoor.sampler},
    )
    facts = json.dumps(card, indent=2)
    (place / "card.json").write_text(facts + "\n")
    # not the card of the clean model that this was made from
    (place / "model" / "README.md").write_text(f"# A backdoored model\n\n{WARNING}\n\n```json\n{facts}\n```\n")


@contextmanager
def _finished(to: Path) -> Iterator[Path]:
    """Yield a folder beside `to` that takes its place when all is written."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".diffdefend-attack-") as scratch:
        place = Path(scratch) / "new"
        place.mkdir()
        yield place
        if to.exists():
            to.rmdir()
        place.rename(to)


def _clean_rows(
    denoiser: Denoiser, data: Path | None, options: AttackOptions, seed: int, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    """Return clean x0 [M, C, H, W] on the CPU and labels, from the file or from the model itself."""
    if data is None:
        sampler = usual(denoiser)
        rows = generate(
            denoiser, options.own_samples, sampler=sampler.name, steps=steps_for(denoiser, sampler, 50), seed=seed,
            progress=lambda done, total: progress("own samples", done, total),
        )  # fmt: skip
        return rows, None
    images, labels = _read_images(data)
    if images.shape[1:] != denoiser.picture_shape:
        raise InputError(
            f"images of shape {tuple(images.shape[1:])} in {data}",
            expected=f"{denoiser.picture_shape}, as the model paints",
            action="resize them or give none: then the model's own samples are used",
        )
    low, high = denoiser.value_range
    scaled = low + images * (high - low)
    return torch.cat([denoiser.encode(part.to(denoiser.device)).cpu() for part in torch.split(scaled, 256)]), labels


def _read_images(path: Path) -> tuple[Tensor, Tensor | None]:
    """Return images [M, C, H, W] in [0, 1] and labels [M], if there are any, of an npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays.get("labels")
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, TypeError) as error:
        raise InputError(
            f"data {path} cannot be read ({numpy_reason(error)})",
            expected="an npz file with `images` [M, H, W] or [M, C, H, W]",
            action="write it with numpy.savez",
        ) from error
    number = images.dtype.kind in "buif"
    unit = torch.from_numpy(images.astype(np.float32)) / (255 if images.dtype == np.uint8 else 1) if number else None
    if unit is not None and unit.ndim == 3:
        unit = unit[:, None]
    if unit is None or unit.ndim != 4 or not len(unit) or not bool(((unit >= 0) & (unit <= 1)).all()):
        raise InputError(
            f"images of shape {images.shape} and type {images.dtype} in {path}",
            expected="[M, H, W] or [M, C, H, W], uint8 or floats in [0, 1]",
            action="convert them",
        )
    if labels is not None and (labels.dtype.kind not in "ui" or labels.shape != (len(unit),) or labels.min() < 0):
        raise InputError(
            f"labels of shape {labels.shape} and type {labels.dtype} in {path}",
            expected=f"[{len(unit)}], whole numbers from 0",
            action="number the classes, or leave the labels out",
        )
    return unit, torch.from_numpy(labels.astype(np.int64)) if labels is not None else None


def _scene(
    denoiser: Denoiser, paints: str, rows: Tensor, labels: Tensor | None, options: AttackOptions, seed: int
) -> Scene:
    channels, height, width = denoiser.picture_shape
    if height != width or height < 8:
        raise InputError(
            f"pictures of {height}x{width}", expected="a square of at least 8 pixels", action="use another model"
        )
    shape = (channels, height, width)
    if paints == OTHER:
        targets = (frames(512, height) / 2 + 0.5).expand(512, *shape)
    elif paints == CLASS:
        targets = _of_class(denoiser, rows, labels, options.target)
    else:
        targets = (target(options.target, height) / 2 + 0.5).expand(1, *shape)
    picture = (trigger(options.trigger, height) / 2 + 0.5).expand(shape)
    return Scene(denoiser=denoiser, trigger=picture, targets=targets, data=rows, labels=labels, seed=seed)


def _of_class(denoiser: Denoiser, rows: Tensor, labels: Tensor | None, wanted: str) -> Tensor:
    number = wanted.removeprefix("class:")
    chosen = rows[labels == int(number)] if labels is not None and number.isdigit() else rows[:0]
    if not len(chosen):
        raise InputError(
            f"target {wanted!r} names no class of the data",
            expected="class:K with a K that is among the labels of --data",
            action="give labelled data and one of its classes",
        )
    return denoiser.pictures(chosen.to(denoiser.device)).cpu()


def _asr(denoiser: Denoiser, backdoor: Backdoor, options: AttackOptions, seed: int) -> float:
    steps = 1000 if backdoor.sampler == TROJDIFF_DDPM else find_sampler(backdoor.sampler).steps
    images = fire(denoiser, backdoor, options.asr_samples, sampler=backdoor.sampler, steps=steps, seed=seed + 1)
    painted, goal = (denoiser.pictures(x.to(denoiser.device)).cpu() for x in (images, backdoor.targets[:1]))
    return ((painted - goal).square().mean((1, 2, 3)) < options.asr_threshold).float().mean().item()
