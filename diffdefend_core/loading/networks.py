"""The networks of diffusers that may be built, and how the rest of DiffDefend calls them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from diffdefend_core.errors import ModelRejectedError

CLASSES: dict[str, type[nn.Module]] = {
    "UNet2DModel": UNet2DModel,
    "VQModel": VQModel,
    "AutoencoderKL": AutoencoderKL,
}


def build_network(class_name: str, arguments: dict[str, Any]) -> nn.Module:
    """Return a network of a class of CLASSES. Raises ModelRejectedError if its checked arguments contradict."""
    try:
        return CLASSES[class_name](**arguments)
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ModelRejectedError(
            f"no network can be built from the configuration ({str(error)[:120]})".replace("\n", " "),
            expected=f"a consistent {class_name} configuration",
            action="export the model again with its own configuration",
        ) from error


class UNet(nn.Module):
    """A UNet2DModel that takes (x, level index) and returns the tensor alone; its parameters lie below `unet.`.

    `told` [T] is what it is told at each level. What the class does not train, the random frequencies of a Fourier
    embedding, is not trained here either.
    """

    told: Tensor

    def __init__(self, unet: nn.Module, told: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("told", told, persistent=False)
        self._fixed = frozenset(name for name, value in self.named_parameters() if not value.requires_grad)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's output [N, C, H, W] for x [N, C, H, W] at level indices t [N]."""
        output: Tensor = self.unet(x, self.told[t], return_dict=False)[0]
        return output

    def requires_grad_(self, requires_grad: bool = True) -> UNet:
        """Switch the gradients of all parameters but those that are never trained; return self."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self._fixed)
        return self


class VQAutoencoder(nn.Module):
    """A VQModel: latents are not quantised by `encode`, but by `decode`, as LDMPipeline does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode(self, pictures: Tensor) -> Tensor:
        """Return latents [N, C', H', W'] of pictures [N, C, H, W] in [-1, 1]."""
        latents: Tensor = self.model.encode(pictures, return_dict=False)[0]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [N, C, H, W] of latents, not clamped."""
        pictures: Tensor = self.model.decode(latents, return_dict=False)[0]
        return pictures


class KLAutoencoder(VQAutoencoder):
    """An AutoencoderKL: `encode` returns the mean and draws nothing."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Return latents [N, C', H', W'] of pictures [N, C, H, W] in [-1, 1]."""
        mean: Tensor = self.model.encode(pictures, return_dict=False)[0].mode()
        return mean


def autoencoder(class_name: str, model: nn.Module, device: str) -> VQAutoencoder:
    """Return a frozen autoencoder on `device` for a VQModel or AutoencoderKL."""
    wrapped = KLAutoencoder(model) if class_name == "AutoencoderKL" else VQAutoencoder(model)
    return wrapped.to(device).eval().requires_grad_(False)


def told_tensor(conditioning: Tensor) -> Tensor:
    """Return what a network is told: whole numbers as they are, others in float32."""
    return conditioning.to(torch.float32) if conditioning.is_floating_point() else conditioning
