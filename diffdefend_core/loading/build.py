"""From a checked model folder to a Denoiser, and back to a folder. With its parts, all of loading that needs torch.

Only classes of the table `networks.CLASSES` are instantiated, from checked arguments; no `from_pretrained` is called,
so nothing is looked up by name or over the network. Besides, DIFFUSERS_DISABLE_REMOTE_CODE is set by this package
before diffusers is imported, and HF_HUB_OFFLINE by the images.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.families.flow import RectifiedFlow
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.loading.families import DECODER, UNET
from diffdefend_core.loading.networks import UNet, autoencoder, build_network, told_tensor
from diffdefend_core.loading.static import Contents, Inspection, Part, inspect_folder
from diffdefend_core.loading.weights import match, read_weights, write_weights

Networks = dict[str, nn.Module]


def load_denoiser(folder: Path, device: str = "cpu") -> Denoiser:
    """Check a model folder, then return it as a frozen float32 Denoiser on `device`.

    Raises InputError and ModelRejectedError as `inspect_folder` does, and ModelRejectedError when the weights do not
    fit the architecture; that is found before memory for it is taken.
    """
    inspection = inspect_folder(folder)
    empty = {name: _empty_network(part) for name, part in inspection.parts.items()}
    for name, part in inspection.parts.items():
        network, names = empty[name]
        network.load_state_dict(read_weights(folder / part.weights, names), strict=True, assign=True)
    networks = {name: network for name, (network, _) in empty.items()}
    return _FAMILIES[inspection.family](inspection, networks, device).freeze()


def save_denoiser(denoiser: Denoiser, source_folder: Path, target_folder: Path) -> Inspection:
    """Write `denoiser`, made from the model in `source_folder`, as a folder of the same layout; return its inspection.

    All files but the weights of the network are copied; the weights keep the names and dtypes of the source. Raises
    ModelRejectedError when the source does not pass the static checks, the denoiser is of another architecture, or
    its weights are not finite.
    """
    source = inspect_folder(source_folder)
    part = source.parts[UNET.name]
    state = denoiser.network.get_submodule("unet").state_dict()
    names = match(state, part.tensors)
    copy_files(source, source_folder, target_folder, without=part.weights)
    write_weights(target_folder / part.weights, state, names, part.tensors)
    return inspect_folder(target_folder)


def copy_files(contents: Contents, source: Path, target: Path, *, without: str) -> None:
    """Copy all files of `contents` but one to the folder `target`, making the folders of all."""
    for file in contents.files:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        if file.path != without:
            shutil.copyfile(source / file.path, target / file.path)


def _empty_network(part: Part) -> tuple[nn.Module, dict[str, str]]:
    """Return the network without memory for its weights, and {parameter: its name in the file}, all shapes compared."""
    with torch.device("meta"):
        empty = build_network(part.class_name, part.arguments)
    return empty, match(empty.state_dict(), part.tensors)


def _unet(inspection: Inspection, networks: Networks, device: str) -> UNet:
    told = told_tensor(torch.from_numpy(inspection.schedule.conditioning))
    return UNet(networks[UNET.name], told).to(device)


def _levels(inspection: Inspection) -> Levels:
    schedule = inspection.schedule
    return Levels(alpha=torch.from_numpy(schedule.alpha), sigma=torch.from_numpy(schedule.sigma))


def _ddpm(inspection: Inspection, networks: Networks, device: str) -> Denoiser:
    return DDPM(
        _unet(inspection, networks, device),
        _levels(inspection),
        shape=inspection.shape,
        value_range=(-1.0, 1.0),
        prediction=inspection.schedule.prediction,
    )


def _ncsn(inspection: Inspection, networks: Networks, device: str) -> Denoiser:
    network = _unet(inspection, networks, device)
    return NCSN(network, _levels(inspection), shape=inspection.shape, value_range=(0.0, 1.0))


def _flow(inspection: Inspection, networks: Networks, device: str) -> Denoiser:
    network = _unet(inspection, networks, device)
    return RectifiedFlow(network, _levels(inspection), shape=inspection.shape, value_range=(-1.0, 1.0))


def _consistency(inspection: Inspection, networks: Networks, device: str) -> Denoiser:
    return ConsistencyModel(
        _unet(inspection, networks, device),
        _levels(inspection),
        shape=inspection.shape,
        value_range=(-1.0, 1.0),
        sigma_data=inspection.schedule.sigma_data,
    )


def _ldm(inspection: Inspection, networks: Networks, device: str) -> Denoiser:
    decoder = inspection.parts[DECODER.name]
    return LatentDiffusion(
        _unet(inspection, networks, device),
        _levels(inspection),
        autoencoder(decoder.class_name, networks[DECODER.name], device),
        shape=inspection.shape,
        picture_shape=inspection.picture_shape,
        value_range=(-1.0, 1.0),
        prediction=inspection.schedule.prediction,
        scaling_factor=decoder.arguments["scaling_factor"],
    )


_FAMILIES: dict[str, Callable[[Inspection, Networks, str], Denoiser]] = {
    "ddpm": _ddpm,
    "ncsn": _ncsn,
    "flow": _flow,
    "consistency": _consistency,
    "ldm": _ldm,
}
