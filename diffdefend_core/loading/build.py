"""From a checked model folder to a Denoiser, and back to a folder. The only part of loading that needs torch.

Only classes of the table `_NETWORKS` are instantiated, from checked arguments; no `from_pretrained` is called, so
nothing is looked up by name or over the network. Processes that load models should also set HF_HUB_OFFLINE=1 and
DIFFUSERS_DISABLE_REMOTE_CODE=1 in their environment before diffusers is imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.safetensors_header import TensorInfo
from diffdefend_core.loading.static import Inspection, inspect_folder

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Names of attention layers before diffusers 0.11, which diffusers itself still reads.
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


class UNet(nn.Module):
    """A UNet2DModel whose forward takes (x, t) and returns the tensor alone."""

    def __init__(self, unet: nn.Module) -> None:
        """Wrap `unet`, whose parameters keep their names below `unet.`."""
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's output [N, C, H, W] for x [N, C, H, W] at timesteps t [N]."""
        output: Tensor = self.unet(x, t, return_dict=False)[0]
        return output


def load_denoiser(folder: Path, device: str = "cpu") -> Denoiser:
    """Check a model folder, then return it as a frozen float32 Denoiser on `device`.

    Raises InputError and ModelRejectedError as `inspect_folder` does, and ModelRejectedError when the weights do not
    fit the architecture; that is found before memory for it is taken.
    """
    inspection = inspect_folder(folder)
    network, names = _empty_network(inspection)
    stored = load_file(folder / inspection.weights)
    weights = {name: stored[old].to(torch.float32, copy=True) for name, old in names.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return _FAMILIES[inspection.family](inspection, UNet(network).to(device)).freeze()


def save_denoiser(denoiser: Denoiser, source_folder: Path, target_folder: Path) -> Inspection:
    """Write `denoiser`, made from the model in `source_folder`, as a folder of the same layout; return its inspection.

    All files but the weights are copied; the weights keep the names and dtypes of the source. Raises
    ModelRejectedError when the source does not pass the static checks, the denoiser is of another architecture, or
    its weights are not finite.
    """
    source = inspect_folder(source_folder)
    _, names = _empty_network(source)
    state = denoiser.network.get_submodule("unet").state_dict()
    _compare({name: tuple(tensor.shape) for name, tensor in state.items()}, source.tensors, names)
    for file in source.files:
        (target_folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        if file.path != source.weights:
            shutil.copyfile(source_folder / file.path, target_folder / file.path)
    tensors = {old: _as_stored(state[name], source.tensors[old]) for name, old in names.items()}
    save_file(tensors, target_folder / source.weights, metadata={"format": "pt"})
    return inspect_folder(target_folder)


def _as_stored(tensor: Tensor, info: TensorInfo) -> Tensor:
    return tensor.detach().to("cpu", _DTYPES[info.dtype]).clone(memory_format=torch.contiguous_format)


def _empty_network(inspection: Inspection) -> tuple[nn.Module, dict[str, str]]:
    """Return the network without memory for its weights, and {parameter: its name in the file}, all shapes compared."""
    with torch.device("meta"):
        empty = _NETWORKS[inspection.network_class](inspection.arguments)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    names = {name: _stored_name(name, inspection.tensors) for name in wanted}
    _compare(wanted, inspection.tensors, names)
    return empty, names


def _stored_name(name: str, tensors: dict[str, TensorInfo]) -> str:
    if name in tensors or ".attentions." not in name:
        return name
    for new, old in _OLD_ATTENTION.items():
        if name.replace(new, old) in tensors:
            return name.replace(new, old)
    return name


def _compare(wanted: dict[str, tuple[int, ...]], stored: dict[str, TensorInfo], names: dict[str, str]) -> None:
    missing = [name for name in wanted if names.get(name) not in stored]
    surplus = sorted(set(stored) - set(names.values()))
    wrong = [name for name in wanted if name not in missing and stored[names[name]].shape != wanted[name]]
    if not (missing or surplus or wrong):
        return
    if wrong:
        first = f"{wrong[0]} has shape {stored[names[wrong[0]]].shape} instead of {wanted[wrong[0]]}"
    else:
        first = f"{missing[0]} is missing" if missing else f"{surplus[0]} is not part of the network"
    raise ModelRejectedError(
        f"the weights do not fit the configuration: {first}"
        f" ({len(wrong)} of another shape, {len(missing)} missing, {len(surplus)} surplus)",
        expected=f"the {len(wanted)} tensors of the configured network",
        action="export the model again with its own configuration",
    )


def _unet(arguments: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = UNet2DModel(**arguments)
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ModelRejectedError(
            f"no network can be built from the configuration ({str(error)[:120]})".replace("\n", " "),
            expected="a consistent UNet2DModel configuration",
            action="export the model again with its own configuration",
        ) from error
    return network


def _ddpm(inspection: Inspection, network: nn.Module) -> Denoiser:
    schedule = inspection.schedule
    levels = Levels.variance_preserving(alphas_cumprod(torch.from_numpy(schedule.betas)))
    return DDPM(network, levels, shape=inspection.shape, value_range=(-1.0, 1.0), prediction=schedule.prediction)


_NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"UNet2DModel": _unet}
_FAMILIES: dict[str, Callable[[Inspection, nn.Module], Denoiser]] = {"ddpm": _ddpm}
