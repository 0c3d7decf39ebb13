"""The static checks of a model folder: what it is, decided without loading it. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdefend_core.artifacts import FileDigest
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.families import FAMILIES, Component, Family
from diffdefend_core.loading.formats import list_files
from diffdefend_core.loading.json_file import read_json_object
from diffdefend_core.loading.safetensors_header import TensorInfo, check_finite, read_header
from diffdefend_core.loading.schedule import Schedule, read_schedule
from diffdefend_core.loading.unet_config import read_unet_config, shape_of

INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the static checks found in a folder that passed them.

    `arguments` are those of the network's class, `tensors` its weights by their name in the file `weights`; both are
    what `build` may use. `findings` are remarks that did not refuse the model.
    """

    family: str
    pipeline: str
    shape: tuple[int, int, int]
    parameters: int
    files: tuple[FileDigest, ...]
    weights_sha256: dict[str, str]
    findings: tuple[str, ...]
    weights: str
    network_class: str
    arguments: dict[str, Any]
    schedule: Schedule
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a pipeline lie: class and configuration path of each component, and the weights."""

    family: Family
    pipeline: str
    classes: dict[str, str]
    configs: dict[str, str]
    weights: str


def inspect_folder(folder: Path) -> Inspection:
    """Check a model folder in the layout of diffusers and return what it is.

    Raises InputError when it is missing or empty, and ModelRejectedError when any file, class, field, tensor or weight
    is not on the allow-list or not sane. Nothing of the folder is executed or unpickled.
    """
    names = [path.as_posix() for path in list_files(folder)]
    objects = {name: read_json_object(folder / name) for name in names if name.endswith(".json")}
    layout = _layout(objects, names)
    network, scheduler = (layout.configs[part.name] for part in layout.family.components)
    arguments = read_unet_config(objects[network], network)
    schedule = read_schedule(objects[scheduler], scheduler)
    tensors = read_header(folder / layout.weights)
    check_finite(folder / layout.weights, tensors)
    files = tuple(_digest(folder, name) for name in names)
    return Inspection(
        family=layout.family.word,
        pipeline=layout.pipeline,
        shape=shape_of(arguments),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        files=files,
        weights_sha256={file.path: file.sha256 for file in files if file.path == layout.weights},
        findings=_findings(layout, objects, tensors),
        weights=layout.weights,
        network_class=layout.classes[layout.family.network.name],
        arguments=arguments,
        schedule=schedule,
        tensors=tensors,
    )


def _layout(objects: dict[str, dict[str, Any]], names: list[str]) -> _Layout:
    if INDEX not in objects:
        raise _rejected(f"the folder holds no {INDEX}", f"a pipeline in the layout of diffusers, with {INDEX}")
    index = objects[INDEX]
    family = _family_of(index)
    classes = {part.name: _class_of(index, part) for part in family.components}
    configs = {part.name: _config_of(objects, names, part, classes[part.name]) for part in family.components}
    network = family.network
    weights = _place(configs[network.name], str(network.weights))
    _check_weight_files(names, weights)
    return _Layout(family, str(index["_class_name"]), classes, configs, weights)


def _family_of(index: dict[str, Any]) -> Family:
    """Return the family of the pipeline class, whose parts must be all that the index names."""
    pipeline = index.get("_class_name")
    family = next((row for row in FAMILIES if isinstance(pipeline, str) and pipeline in row.pipelines), None)
    if family is None:
        known = sorted(name for row in FAMILIES for name in row.pipelines)
        raise _rejected(f"{INDEX} names the pipeline {str(pipeline)[:80]!r}", f"one of {', '.join(known)}")
    parts = {part.name for part in family.components}
    others = [key for key, value in index.items() if isinstance(value, list) and key not in parts]
    if others:
        raise _rejected(f"{INDEX} names the component {others[0][:80]!r}", f"{', '.join(sorted(parts))} only")
    return family


def _class_of(index: dict[str, Any], part: Component) -> str:
    entry = index.get(part.name)
    for name in sorted(part.classes):
        if entry == ["diffusers", name]:
            return name
    shown = "no such component" if entry is None else str(entry)[:80]
    raise _rejected(
        f"{part.name} in {INDEX} is {shown}", f"[diffusers, {' or '.join(sorted(part.classes))}] for {part.name}"
    )


def _config_of(objects: dict[str, dict[str, Any]], names: list[str], part: Component, class_name: str) -> str:
    """Return the path of a component's configuration: in its folder, or beside the index as in early pipelines."""
    in_folder = f"{part.name}/{part.config}"
    # diffusers looks beside the index only if there is no folder of this name at all.
    has_folder = any(name.startswith(f"{part.name}/") for name in names)
    path = in_folder if has_folder else part.config
    if path not in objects:
        raise _rejected(f"the configuration of {part.name} is missing", f"the file {in_folder}")
    named = objects[path].get("_class_name", class_name)
    if named != class_name:
        raise _rejected(f"{path} is of class {str(named)[:80]!r}", f"{class_name}, as {INDEX} says")
    return path


def _place(config: str, name: str) -> str:
    folder, slash, _ = config.rpartition("/")
    return f"{folder}{slash}{name}"


def _check_weight_files(names: list[str], weights: str) -> None:
    """Only the weights that are scanned may be there: another reader could prefer a variant."""
    if weights not in names:
        raise _rejected(f"the weights {weights} are missing", "one safetensors file for the network")
    others = [name for name in names if name.endswith(".safetensors") and name != weights]
    if others:
        raise _rejected(f"{others[0]} holds further weights that the scan would not cover", f"only {weights}")


def _findings(layout: _Layout, objects: dict[str, dict[str, Any]], tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    used = {INDEX, *layout.configs.values()}
    findings = [f"{name} belongs to no component and is not used" for name in sorted(objects) if name not in used]
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if dtypes != ["F32"]:
        findings.append(f"the weights are stored as {', '.join(dtypes)} and computed in float32")
    return tuple(findings)


def _digest(folder: Path, name: str) -> FileDigest:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(path=name, size=(folder / name).stat().st_size, sha256=sha256)


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(found, expected=expected, action="this model is not supported; do not load it")
