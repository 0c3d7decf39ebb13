"""LPIPS (Zhang et al. 2018) by the package lpips, with backbone weights that the user provides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffdefend_core.errors import InputError
from diffdefend_core.evaluation.weights import check_sha256, missing, read_weights

# alexnet-owt-7be5be79.pth of torchvision
SHA256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
WHAT = "LPIPS"
# the smallest side that AlexNet's layers leave something of; the metric was made for 64 pixels
LEAST_SIDE = 64

Perceptual = Callable[[Tensor, Tensor], Tensor]


def perceptual(weights: bytes, sha256: str = "") -> Perceptual:
    """Return the function (images [N, C, H, W], target [C, H, W], all in [0, 1]) -> LPIPS [N] with AlexNet.

    `weights` is the content of torchvision's AlexNet checkpoint, or of another one whose sha256 is given; the linear
    layers are those of the package (version 0.1). Raises InputError for other weights, MissingExtraError without lpips.
    """
    action = "give torchvision's alexnet-owt-7be5be79.pth, or pin yours with evaluation.lpips_sha256"
    check_sha256(weights, sha256 or SHA256, WHAT, action)
    network = _network()
    _fill(network.net, read_weights(weights, WHAT))
    network.eval().requires_grad_(False)
    return lambda images, target: _distance(network, images, target)


def _network() -> Any:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise missing("lpips", error, "leave lpips_weights out") from error
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


def _fill(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `features.<layer>.<name>` of AlexNet into the slices that lpips cuts it into."""
    given = {name.removeprefix("features."): value for name, value in weights.items() if name.startswith("features.")}
    wanted = backbone.state_dict()
    taken = {name: given.get(name.partition(".")[2]) for name in wanted}
    if any(value is None or value.shape != wanted[name].shape for name, value in taken.items()):
        raise InputError(
            "weights of LPIPS are those of another network",
            expected="AlexNet as torchvision saves it (`features.0.weight` ...)",
            action="give alexnet-owt-7be5be79.pth as evaluation.lpips_weights",
        )
    backbone.load_state_dict(taken)


@torch.no_grad()
def _distance(network: Any, images: Tensor, target: Tensor, batch: int = 64) -> Tensor:
    goal = _prepared(target[None])
    parts = [network(part, goal.expand_as(part)).flatten() for part in torch.split(_prepared(images), batch)]
    return torch.cat(parts).double()


def _prepared(images: Tensor) -> Tensor:
    """Return images in [-1, 1] with three channels and no side below LEAST_SIDE: smaller ones are enlarged."""
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    factor = LEAST_SIDE / min(colour.shape[-2:])
    if factor > 1:
        colour = nn.functional.interpolate(colour, scale_factor=factor, mode="bilinear", align_corners=False)
    return colour.float() * 2 - 1
