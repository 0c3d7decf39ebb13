"""Inception features, as FID is usually measured: torch-fidelity's network, with weights that the user provides."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdefend_core.errors import InputError
from diffdefend_core.evaluation.weights import missing, read_weights

DIMENSIONS = 2048
# weights-inception-2015-12-05-6726825d.pth of torch-fidelity, the same bytes as pt_inception-2015-12-05-6726825d.pth
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHAT = "feature extractor inception-v3"


def inception(content: bytes) -> torch.nn.Module:
    """Return torch-fidelity's network with these weights: images [N, 3, H, W] uint8 to features ([N, 2048],).

    `content` must have been compared with its pinned digest. Raises MissingExtraError without torch-fidelity,
    InputError for weights of another network.
    """
    kind = _network()
    with tempfile.TemporaryDirectory(prefix="diffdefend-weights-") as folder:
        # its constructor would unpickle whatever it is given: it gets a file of our own with nothing but tensors
        path = Path(folder) / "weights.pth"
        torch.save(read_weights(content, WHAT), path)
        try:
            network: torch.nn.Module = kind("inception-v3", ["2048"], feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            raise InputError(
                "weights of feature extractor inception-v3 are those of another network",
                expected="torch-fidelity's InceptionV3 (weights-inception-2015-12-05-6726825d.pth)",
                action="give that file as evaluation.extractor_weights",
            ) from error
    return network


def _network() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise missing("torch-fidelity", error, "name another evaluation.extractor") from error
    return FeatureExtractorInceptionV3


@torch.no_grad()
def inception_features(network: torch.nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """Return features [N, 2048] in float64 of images [N, C, H, W] in [0, 1], quantised to 8 bits.

    One channel is repeated three times. The network brings the pictures to 299 x 299 itself, as TensorFlow 1 did.
    """
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    pixels = (colour.clamp(0, 1) * 255).round().to(torch.uint8)
    return torch.cat([network(part)[0] for part in torch.split(pixels, batch)]).double()
