"""Feature extractors by name, with pinned weights: distances of different extractors are never compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

from diffdefend_core.errors import InputError


@dataclass(frozen=True)
class Extractor:
    """`apply` maps images [N, C, H, W] in [0, 1] to features [N, D] in float64; `sha256` pins its weights."""

    name: str
    sha256: str
    apply: Callable[[Tensor], Tensor]


class DigitsCnn(nn.Module):
    """A small classifier of 16x16 grey digits; its features are the 32 activations before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.Tanh(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores [N, 10] of images [N, 1, 16, 16] in [0, 1]."""
        scores: Tensor = self.head(self.body(images))
        return scores


# name -> (file in this package's weights/, sha256); made by `python -m zoo.extractor`
SHIPPED = {
    "digits-cnn-v1": ("digits-cnn-v1.safetensors", "93807760d43297f0497f8c8de7ea38fb8edf840e8222f49c2f2e125dc861c377")
}


def extractor(name: str) -> Extractor:
    """Return the extractor of that name. Raises InputError for an unknown name or weights of another digest."""
    if name not in SHIPPED:
        raise InputError(
            f"feature extractor {name!r}", expected="one of " + ", ".join(SHIPPED), action="choose one of these"
        )
    file, pinned = SHIPPED[name]
    content = (resources.files(__package__) / "weights" / file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != pinned:
        raise InputError(
            f"weights of feature extractor {name} have sha256 {digest}", expected=pinned, action="reinstall diffdefend"
        )
    from safetensors.torch import load

    network = DigitsCnn()
    network.load_state_dict(load(content))
    network.eval().requires_grad_(False)
    return Extractor(name=name, sha256=digest, apply=lambda images: _grey_features(network, images))


@torch.no_grad()
def _grey_features(network: DigitsCnn, images: Tensor, batch: int = 256) -> Tensor:
    """Return features [N, 32]: channels averaged, resized to 16x16, quantised to 8 bits as a saved picture would be."""
    grey = images.float().cpu().mean(dim=1, keepdim=True)
    if grey.shape[-2:] != (16, 16):
        grey = nn.functional.interpolate(grey, size=16, mode="bilinear", antialias=True, align_corners=False)
    grey = (grey.clamp(0, 1) * 255).round() / 255
    return torch.cat([network.body(part) for part in torch.split(grey, batch)]).double()
