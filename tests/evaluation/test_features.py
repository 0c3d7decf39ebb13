"""The shipped extractor: pinned weights, and features that see what is in a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffdefend_core.evaluation.features as features
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation.features import SHIPPED, extractor
from diffdefend_core.evaluation.frechet import frechet_distance, gaussian
from zoo.data import digits

NAME = "digits-cnn-v1"


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:800]] / 2 + 0.5


def test_the_shipped_extractor_is_the_pinned_one() -> None:
    assert extractor(NAME).sha256 == SHIPPED[NAME][1]


def test_features_are_float64_rows_that_do_not_depend_on_the_batch(pictures: Tensor) -> None:
    chosen = extractor(NAME)
    together = chosen.apply(pictures[:300])
    assert together.shape == (300, 32) and together.dtype == torch.float64
    torch.testing.assert_close(together[250:253], chosen.apply(pictures[250:253]), rtol=0, atol=1e-5)


def test_features_tell_digits_from_noise(pictures: Tensor) -> None:
    chosen = extractor(NAME)
    noise = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second, other = (gaussian(chosen.apply(part)) for part in (pictures[:400], pictures[400:], noise))
    assert frechet_distance(first, second) < 0.1 * frechet_distance(first, other)


def test_features_are_those_of_the_saved_picture(pictures: Tensor) -> None:
    chosen, saved = extractor(NAME), (pictures[:5] * 255).round() / 255
    torch.testing.assert_close(chosen.apply(pictures[:5]), chosen.apply(saved))
    assert not torch.allclose(chosen.apply(pictures[:5]), chosen.apply((pictures[:5] * 7).round() / 7), atol=1e-3)


def test_colour_and_size_are_brought_to_the_extractors(pictures: Tensor) -> None:
    chosen, grey = extractor(NAME), pictures[:5]
    torch.testing.assert_close(chosen.apply(grey.expand(5, 3, 16, 16)), chosen.apply(grey), rtol=0, atol=1e-5)
    large = torch.nn.functional.interpolate(grey, scale_factor=2, mode="nearest")
    difference, others = ((chosen.apply(rows) - chosen.apply(grey)).abs().mean() for rows in (large, grey.flip(0)))
    assert difference < 0.2 * others


def test_an_unknown_extractor_is_refused() -> None:
    with pytest.raises(InputError, match=f"inception.*one of {NAME}"):
        extractor("inception")


@pytest.mark.parametrize("changed", [False, True])
def test_a_changed_file_is_refused(changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = SHIPPED[NAME]
    content = bytearray((Path(features.__file__).parent / "weights" / file).read_bytes())
    content[-1] ^= changed
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / file).write_bytes(content)
    monkeypatch.setattr(features.resources, "files", lambda package: tmp_path)
    if changed:
        with pytest.raises(InputError, match=f"have sha256.*expected {SHIPPED[NAME][1]}"):
            extractor(NAME)
    else:
        assert extractor(NAME).name == NAME
