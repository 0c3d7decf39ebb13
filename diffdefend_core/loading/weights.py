"""Between the tensors of a safetensors file and the state of a network: names, shapes and dtypes compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.safetensors_header import TensorInfo

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Names of attention layers before diffusers 0.11, which diffusers itself still reads.
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def match(state: Mapping[str, Tensor], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return {name in the state: name in the file} for a network's state and the tensors of a file.

    Raises ModelRejectedError unless every tensor of each side has one of the same shape on the other.
    """
    names = {name: _stored_name(name, tensors) for name in state}
    missing = [name for name in state if names[name] not in tensors]
    surplus = sorted(set(tensors) - set(names.values()))
    wrong = [name for name in state if name not in missing and tensors[names[name]].shape != tuple(state[name].shape)]
    if not (missing or surplus or wrong):
        return names
    if wrong:
        first = f"{wrong[0]} has shape {tensors[names[wrong[0]]].shape} instead of {tuple(state[wrong[0]].shape)}"
    else:
        first = f"{missing[0]} is missing" if missing else f"{surplus[0]} is not part of the network"
    raise ModelRejectedError(
        f"the weights do not fit the configuration: {first}"
        f" ({len(wrong)} of another shape, {len(missing)} missing, {len(surplus)} surplus)",
        expected=f"the {len(state)} tensors of the configured network",
        action="export the model again with its own configuration",
    )


def _stored_name(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    if name in tensors or ".attentions." not in name:
        return name
    for new, old in _OLD_ATTENTION.items():
        if name.replace(new, old) in tensors:
            return name.replace(new, old)
    return name


def read_weights(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a state in float32 from a file, for `names` as `match` returns them. No memory is shared with the file.

    Tensors are read one by one: half-precision weights never stand in memory in both forms.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(old).to(torch.float32, copy=True) for name, old in names.items()}


def write_weights(
    path: Path, state: Mapping[str, Tensor], names: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    """Write a state under the names and in the dtypes of the `tensors` that it was read from."""
    stored = {old: _as_stored(state[name], tensors[old]) for name, old in names.items()}
    save_file(stored, path, metadata={"format": "pt"})


def _as_stored(tensor: Tensor, info: TensorInfo) -> Tensor:
    return tensor.detach().to("cpu", _DTYPES[info.dtype]).clone(memory_format=torch.contiguous_format)
