"""Inception: pinned before it is read, and the numbers of torch-fidelity, which must be installed for those tests."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdefend_core.errors import InputError, MissingExtraError
from diffdefend_core.evaluation.features import PROVIDED, extractor
from diffdefend_core.evaluation.frechet import frechet_distance, gaussian

NAME = "inception-v3"


def checkpoint(tensors: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_weights_are_needed_and_none_are_fetched() -> None:
    with pytest.raises(InputError, match=f"without weights; .*extractor_weights.*{PROVIDED[NAME]}.*nothing is downl"):
        extractor(NAME)


def test_another_digest_is_refused_with_both() -> None:
    content = checkpoint({})
    with pytest.raises(InputError, match=f"have sha256 {sha256(content)}; expected {PROVIDED[NAME]}"):
        extractor(NAME, content)
    with pytest.raises(InputError, match=f"have sha256 {sha256(content)}; expected {'1' * 64}"):
        extractor(NAME, content, "1" * 64)


def test_a_shipped_extractor_takes_no_weights() -> None:
    with pytest.raises(InputError, match="weights for feature extractor digits-cnn-v1, which has its own"):
        extractor("digits-cnn-v1", b"x")


def test_without_torch_fidelity_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    content = checkpoint({})
    with pytest.raises(MissingExtraError, match=r"torch-fidelity is not installed.*diffdefend\[perceptual\]"):
        extractor(NAME, content, sha256(content))


@pytest.fixture(scope="module")
def network() -> Any:
    """torch-fidelity's network with random weights."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity")

    class Bare(inception.FeatureExtractorInceptionV3):  # type: ignore[misc,name-defined]
        def load_state_dict(self, state: object, *args: object, **kwargs: object) -> None:
            """Keep what the constructor drew: it would load a file."""

    torch.manual_seed(0)
    return Bare("random", ["2048"], feature_extractor_weights_path=io.BytesIO(checkpoint({})))


def test_features_are_those_of_torch_fidelity(network: Any) -> None:
    content = checkpoint(network.state_dict())
    chosen = extractor(NAME, content, sha256(content))
    assert (chosen.sha256, chosen.dimensions) == (sha256(content), 2048)
    pixels = torch.randint(0, 256, (5, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = network(pixels)[0].double()
    found = chosen.features(pixels / 255)
    assert found.dtype == torch.float64 and expected.std(0).max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    grey = pixels[:, :1] / 255
    torch.testing.assert_close(chosen.features(grey), chosen.features(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_distance_is_that_of_torchmetrics(network: Any) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    content = checkpoint(network.state_dict())
    chosen = extractor(NAME, content, sha256(content))
    generator = torch.Generator().manual_seed(1)
    # torchmetrics brings images to 299 x 299 in another way; of this size there is nothing to bring
    real, fake = (torch.rand(6, 3, 299, 299, generator=generator) ** power for power in (1, 2))
    theirs = FrechetInceptionDistance(feature=Bare2048(network), normalize=True, input_img_size=(3, 299, 299))
    for images, is_real in ((real, True), (fake, False)):
        theirs.update(images, real=is_real)
    first, second = (gaussian(chosen.features((images * 255).byte() / 255)) for images in (real, fake))
    assert frechet_distance(first, second) == pytest.approx(theirs.compute().item(), rel=1e-3)


class Bare2048(torch.nn.Module):
    """The random network as torchmetrics takes one; it hands images over in uint8."""

    num_features = 2048

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images if images.dtype == torch.uint8 else (images * 255).byte()
        found: torch.Tensor = self.network(pixels)[0]
        return found


def test_weights_of_another_network_are_refused(network: Any) -> None:
    content = checkpoint({"fc.weight": torch.zeros(3, 3)})
    with pytest.raises(InputError, match="are those of another network") as caught:
        extractor(NAME, content, sha256(content))
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_refused(network: Any, tmp_path: Path) -> None:
    broken = {**network.state_dict()}
    broken["Conv2d_1a_3x3.conv.weight"] = broken["Conv2d_1a_3x3.conv.weight"] * float("nan")
    content = checkpoint(broken)
    chosen = extractor(NAME, content, sha256(content))
    with pytest.raises(InputError, match="features that are not finite"):
        chosen.features(torch.rand(2, 3, 8, 8))
