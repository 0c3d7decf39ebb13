"""LPIPS: pinned weights, and the numbers of torchmetrics; both need torchvision, without which tests are skipped."""

from __future__ import annotations

import hashlib
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdefend_core.errors import InputError, MissingExtraError
from diffdefend_core.evaluation.perceptual import SHA256, perceptual


def checkpoint(tensors: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def opened(content: bytes) -> Any:
    return perceptual(content, hashlib.sha256(content).hexdigest())


def test_another_digest_is_refused_with_both() -> None:
    content = checkpoint({})
    with pytest.raises(InputError, match=f"have sha256 {hashlib.sha256(content).hexdigest()}; expected {SHA256}"):
        perceptual(content)


def test_without_lpips_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtraError, match=r"lpips is not installed.*diffdefend\[perceptual\].*leave"):
        opened(checkpoint({}))


@pytest.fixture(scope="module")
def alexnet() -> dict[str, Tensor]:
    """AlexNet with random weights, as torchvision saves it."""
    pytest.importorskip("lpips", reason="needs lpips and torchvision")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    return dict(alexnet(weights=None).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_the_distance_is_that_of_torchmetrics(alexnet: dict[str, Tensor]) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(net="alex", pnet_rand=True)
    slices = {name: alexnet[f"features.{name.partition('.')[2]}"] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict(slices)
    images, target = torch.rand(3, 3, 64, 72), torch.rand(3, 64, 72)
    with torch.no_grad():
        expected = theirs(images, target.expand(3, -1, -1, -1), normalize=True).flatten().double()
    measure = opened(checkpoint(alexnet))
    found = measure(images, target)
    assert expected.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measure(target[None], target), torch.zeros(1, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
def test_small_grey_pictures_are_measured_too(alexnet: dict[str, Tensor]) -> None:
    measure, target = opened(checkpoint(alexnet)), torch.rand(1, 16, 16)
    near, far = ((target + amount * torch.rand(4, 1, 16, 16)).clamp(0, 1) for amount in (0.05, 0.8))
    assert 0 < measure(near, target).mean() < measure(far, target).mean()


@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_network_are_refused(alexnet: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="weights of LPIPS are those of another network"):
        opened(checkpoint({"features.0.weight": torch.zeros(3, 3)}))
