"""The static checks of a model folder: what it is, decided without loading it. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdefend_core.artifacts import FileDigest
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.autoencoder_config import picture_shape_of, read_kl_config, read_vq_config
from diffdefend_core.loading.families import DECODER, FAMILIES, UNET, Component, Family
from diffdefend_core.loading.formats import check_total, list_files
from diffdefend_core.loading.json_file import read_json_object
from diffdefend_core.loading.safetensors_header import TensorInfo, check_finite, read_header
from diffdefend_core.loading.schedule import Schedule, read_schedule
from diffdefend_core.loading.unet_config import check_told, read_unet_config, shape_of

INDEX = "model_index.json"
# The objects made of JSON take up to fifty times its size: the files of a folder may not add up.
MAX_JSON_BYTES = 4_000_000
Objects = dict[str, dict[str, Any]]

_CONFIGS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "UNet2DModel": read_unet_config,
    "VQModel": read_vq_config,
    "AutoencoderKL": read_kl_config,
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The files of a folder that passed, with the tensors of each safetensors file by their name in it.

    `findings` are remarks that did not refuse the model.
    """

    files: tuple[FileDigest, ...]
    tensors: dict[str, dict[str, TensorInfo]]
    findings: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of weights in all files."""
        return sum(tensor.elements for tensors in self.tensors.values() for tensor in tensors.values())

    @property
    def weights_sha256(self) -> dict[str, str]:
        """The sha256 (hex) of each safetensors file by its path."""
        return {file.path: file.sha256 for file in self.files if file.path in self.tensors}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A network of a pipeline: its class, the path of its configuration, and the path and tensors of its weights.

    `arguments` are those of the class, checked; they and the tensors are what `build` may use.
    """

    class_name: str
    config: str
    arguments: dict[str, Any]
    weights: str
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class Inspection(Contents):
    """What the static checks found in a pipeline that passed them.

    `shape` is (C, H, W) of what the network denoises, `picture_shape` that of the pictures; they differ for a latent
    model. `classes` are those of all components, `parts` the networks, both by their name in the pipeline.
    """

    family: str
    pipeline: str
    shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]
    classes: dict[str, str]
    parts: dict[str, Part]
    schedule: Schedule


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a pipeline lie: class and configuration path of each component, weights of each network."""

    family: Family
    pipeline: str
    classes: dict[str, str]
    configs: dict[str, str]
    weights: dict[str, str]


def inspect_folder(folder: Path) -> Inspection:
    """Check a model folder in the layout of diffusers and return what it is.

    Raises InputError when it is missing or empty, and ModelRejectedError when any file, class, field, tensor or weight
    is not on the allow-list or not sane. Nothing of the folder is executed or unpickled.
    """
    files = _digests(folder)
    names = [file.path for file in files]
    objects = _read_objects(folder, files)
    layout = _layout(objects, names)
    arguments = {
        name: _CONFIGS[layout.classes[name]](objects[layout.configs[name]], layout.configs[name])
        for name in layout.weights
    }
    schedule = _schedule(layout, objects)
    check_told(arguments[UNET.name], schedule.conditioning, layout.configs[UNET.name])
    shape = shape_of(arguments[UNET.name])
    decoder = arguments.get(DECODER.name)
    tensors = _read_tensors(folder, layout.weights.values())
    return Inspection(
        family=layout.family.word,
        pipeline=layout.pipeline,
        shape=shape,
        picture_shape=picture_shape_of(decoder, shape, layout.configs[DECODER.name]) if decoder else shape,
        classes=layout.classes,
        parts={name: _part(layout, name, arguments[name], tensors) for name in layout.weights},
        schedule=schedule,
        files=files,
        tensors=tensors,
        findings=(*_unused(layout, objects), *_unscaled(layout, objects), *_dtypes(tensors)),
    )


def inspect_contents(folder: Path) -> Contents:
    """Check the files of a folder whose layout only its adapter knows: formats, JSON, headers, finite weights.

    Raises InputError when it is missing or empty, and ModelRejectedError when a file is not of an allowed format or
    not sane, or when there is no safetensors file.
    """
    files = _digests(folder)
    _read_objects(folder, files)
    weights = [file.path for file in files if file.path.endswith(".safetensors")]
    if not weights:
        raise _rejected("the folder holds no weights", "at least one safetensors file")
    tensors = _read_tensors(folder, weights)
    return Contents(files=files, tensors=tensors, findings=_dtypes(tensors))


def _digests(folder: Path) -> tuple[FileDigest, ...]:
    """Return the digests of all files, which are taken before anything is parsed."""
    names = [path.as_posix() for path in list_files(folder)]
    check_total(sum((folder / name).stat().st_size for name in names))
    return tuple(_digest(folder, name) for name in names)


def _read_objects(folder: Path, files: Sequence[FileDigest]) -> Objects:
    found = [file for file in files if file.path.endswith(".json")]
    total = sum(file.size for file in found)
    if total > MAX_JSON_BYTES:
        raise _rejected(f"the JSON files have {total} bytes together", f"at most {MAX_JSON_BYTES} bytes of JSON")
    return {file.path: read_json_object(folder / file.path) for file in found}


def _read_tensors(folder: Path, weights: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
    tensors = {name: read_header(folder / name) for name in weights}
    for name, found in tensors.items():
        check_finite(folder / name, found)
    return tensors


def _schedule(layout: _Layout, objects: Objects) -> Schedule:
    name = layout.family.scheduler.name
    return read_schedule(layout.classes[name], objects[layout.configs[name]], layout.configs[name])


def _part(layout: _Layout, name: str, arguments: dict[str, Any], tensors: dict[str, dict[str, TensorInfo]]) -> Part:
    weights = layout.weights[name]
    return Part(
        class_name=layout.classes[name],
        config=layout.configs[name],
        arguments=arguments,
        weights=weights,
        tensors=tensors[weights],
    )


def _layout(objects: Objects, names: list[str]) -> _Layout:
    if INDEX not in objects:
        raise _rejected(
            f"the folder holds no {INDEX}",
            f"a pipeline in the layout of diffusers, with {INDEX}, or the name of its adapter",
        )
    index = objects[INDEX]
    family = _family_of(index)
    classes = {part.name: _class_of(index, part) for part in family.components}
    flat = len(family.networks) == 1
    configs = {part.name: _config_of(objects, names, part, classes[part.name], flat) for part in family.components}
    weights = {part.name: _place(configs[part.name], part.weights) for part in family.networks}
    _check_weight_files(names, family, weights)
    return _Layout(family, str(index["_class_name"]), classes, configs, weights)


def _family_of(index: dict[str, Any]) -> Family:
    """Return the family of the pipeline and scheduler class, whose parts must be all that the index names."""
    pipeline = index.get("_class_name")
    rows = [row for row in FAMILIES if isinstance(pipeline, str) and pipeline in row.pipelines]
    if not rows:
        known = sorted({name for row in FAMILIES for name in row.pipelines})
        raise _rejected(f"{INDEX} names the pipeline {str(pipeline)[:80]!r}", f"one of {', '.join(known)}")
    entry = index.get("scheduler")
    family = next((row for row in rows if entry in _entries(row.scheduler)), None)
    if family is None:
        raise _wrong_class(entry, "scheduler", sorted(name for row in rows for name in row.schedulers))
    parts = {part.name for part in family.components}
    others = [key for key, value in index.items() if isinstance(value, list) and key not in parts]
    if others:
        raise _rejected(f"{INDEX} names the component {others[0][:80]!r}", f"{', '.join(sorted(parts))} only")
    return family


def _entries(part: Component) -> list[list[str]]:
    return [["diffusers", name] for name in sorted(part.classes)]


def _class_of(index: dict[str, Any], part: Component) -> str:
    entry = index.get(part.name)
    if entry in (None, [None, None]):
        raise _rejected(f"{INDEX} names no {part.name}: {part.role} is missing", f"a whole {index['_class_name']}")
    if entry not in _entries(part):
        raise _wrong_class(entry, part.name, sorted(part.classes))
    return str(entry[1])


def _wrong_class(entry: Any, name: str, classes: list[str]) -> ModelRejectedError:
    return _rejected(f"{name} in {INDEX} is {str(entry)[:80]}", f"[diffusers, {' or '.join(classes)}] for {name}")


def _config_of(objects: Objects, names: list[str], part: Component, class_name: str, flat: bool) -> str:
    """Return the path of a component's configuration: in its folder, or beside the index as in early pipelines."""
    in_folder = f"{part.name}/{part.config}"
    # diffusers looks beside the index only if there is no folder of this name at all.
    has_folder = any(name.startswith(f"{part.name}/") for name in names)
    path = in_folder if has_folder or not flat else part.config
    if path not in objects:
        raise _rejected(f"the configuration of {part.name}, {part.role}, is missing", f"the file {in_folder}")
    named = objects[path].get("_class_name", class_name)
    if named != class_name:
        raise _rejected(f"{path} is of class {str(named)[:80]!r}", f"{class_name}, as {INDEX} says")
    return path


def _place(config: str, name: str) -> str:
    folder, slash, _ = config.rpartition("/")
    return f"{folder}{slash}{name}"


def _check_weight_files(names: list[str], family: Family, weights: dict[str, str]) -> None:
    """Only the weights that are scanned may be there: another reader could prefer a variant."""
    for part in family.networks:
        if weights[part.name] not in names:
            raise _rejected(
                f"the weights {weights[part.name]} of {part.role} are missing", "one safetensors file for each network"
            )
    others = [name for name in names if name.endswith(".safetensors") and name not in weights.values()]
    if others:
        raise _rejected(
            f"{others[0]} holds further weights that the scan would not cover", f"only {', '.join(weights.values())}"
        )


def _unused(layout: _Layout, objects: Objects) -> list[str]:
    used = {INDEX, *layout.configs.values()}
    return [f"{name} belongs to no component and is not used" for name in sorted(objects) if name not in used]


def _unscaled(layout: _Layout, objects: Objects) -> list[str]:
    config = layout.configs.get(DECODER.name)
    if config is None or "scaling_factor" in objects[config]:
        return []
    return [f"{config} has no scaling_factor: latents are decoded unscaled (diffusers would divide them by 0.18215)"]


def _dtypes(tensors: dict[str, dict[str, TensorInfo]]) -> tuple[str, ...]:
    dtypes = sorted({tensor.dtype for found in tensors.values() for tensor in found.values()})
    return () if dtypes == ["F32"] else (f"the weights are stored as {', '.join(dtypes)} and computed in float32",)


def _digest(folder: Path, name: str) -> FileDigest:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(path=name, size=(folder / name).stat().st_size, sha256=sha256)


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(found, expected=expected, action="this model is not supported; do not load it")
