"""Feature extractors by name, with pinned weights: distances of different extractors are never compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

from diffdefend_core.errors import InputError
from diffdefend_core.evaluation import inception
from diffdefend_core.evaluation.weights import check_sha256


@dataclass(frozen=True)
class Extractor:
    """`apply` maps images [N, C, H, W] in [0, 1] to features [N, `dimensions`] in float64.

    `sha256` pins its weights. Features of extractors with another name or digest are never compared.
    """

    name: str
    sha256: str
    dimensions: int
    apply: Callable[[Tensor], Tensor]

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images. Raises InputError if they are not finite: the weights are at fault."""
        found = self.apply(images)
        if not found.isfinite().all():
            raise InputError(
                f"feature extractor {self.name} answers with features that are not finite",
                expected="finite features of pictures in [0, 1]",
                action="give it other weights",
            )
        return found


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


# extractors whose weights the user provides: name -> sha256 of the published file
PROVIDED = {"inception-v3": inception.SHA256}


def extractor(name: str, weights: bytes = b"", sha256: str = "") -> Extractor:
    """Return the extractor of that name; one that is not shipped needs the content of its `weights` file.

    `sha256` pins other weights than the published ones. Raises InputError for an unknown name, or weights that are
    missing, of another digest, or given to an extractor that has its own; MissingExtraError without torch-fidelity.
    """
    if name in PROVIDED:
        return _provided(name, weights, sha256 or PROVIDED[name])
    if name not in SHIPPED:
        known = ", ".join([*SHIPPED, *PROVIDED])
        raise InputError(f"feature extractor {name!r}", expected=f"one of {known}", action="choose one of these")
    if weights or sha256:
        raise InputError(
            f"weights for feature extractor {name}, which has its own",
            expected=f"evaluation.extractor_weights with {', '.join(PROVIDED)} only",
            action="leave extractor_weights and extractor_sha256 out, or name the other extractor",
        )
    return _shipped(name)


def _provided(name: str, weights: bytes, pinned: str) -> Extractor:
    if not weights:
        raise InputError(
            f"feature extractor {name} without weights",
            expected=f"evaluation.extractor_weights: the path or URI of its file (sha256 {pinned})",
            action="download the file where you may, and name it: nothing is downloaded here",
        )
    action = "give the published file, or pin yours with evaluation.extractor_sha256"
    digest = check_sha256(weights, pinned, f"feature extractor {name}", action)
    network = inception.inception(weights)
    return Extractor(name, digest, inception.DIMENSIONS, lambda images: inception.inception_features(network, images))


def _shipped(name: str) -> Extractor:
    file, pinned = SHIPPED[name]
    content = (resources.files(__package__) / "weights" / file).read_bytes()
    digest = check_sha256(content, pinned, f"feature extractor {name}", "reinstall diffdefend")
    from safetensors.torch import load

    network = DigitsCnn()
    network.load_state_dict(load(content))
    network.eval().requires_grad_(False)
    return Extractor(name, digest, 32, lambda images: _grey_features(network, images))


@torch.no_grad()
def _grey_features(network: DigitsCnn, images: Tensor, batch: int = 256) -> Tensor:
    """Return features [N, 32]: channels averaged, resized to 16x16, quantised to 8 bits as a saved picture would be."""
    grey = images.float().cpu().mean(dim=1, keepdim=True)
    if grey.shape[-2:] != (16, 16):
        grey = nn.functional.interpolate(grey, size=16, mode="bilinear", antialias=True, align_corners=False)
    grey = (grey.clamp(0, 1) * 255).round() / 255
    return torch.cat([network.body(part) for part in torch.split(grey, batch)]).double()
