"""Quality: what no choice of batches or order may change, and what is asked of the number of samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffdefend_core.diffusion.generate as generate
import diffdefend_core.evaluation.features as features
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation import check_counts, extractor, from_features, plain_images, quality
from diffdefend_core.evaluation.frechet import gaussian
from diffdefend_core.evaluation.reference import Reference, basis
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import silent
from zoo.data import digits

CHOSEN = extractor("digits-cnn-v1")
OPTIONS = EvaluationOptions(samples=40, sample_steps=4, resamples=20)
MODEL = Path(__file__).parents[2] / "zoo" / "digits" / "base-a"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return from_features([CHOSEN.apply(digits()[::4] / 2 + 0.5)], CHOSEN, "digits")


def values(images: Tensor, reference: Reference) -> dict[str, float]:
    return {name: item.value for name, item in quality(images, reference, CHOSEN, OPTIONS, seed=0).items()}


def test_the_batch_size_changes_no_metric(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_denoiser(MODEL)
    whole = values(plain_images(model, OPTIONS, 3, silent), reference)
    monkeypatch.setattr(generate, "BATCH", 7)
    split = torch.split
    monkeypatch.setattr(features.torch, "split", lambda tensor, _size: split(tensor, 3))
    parts = values(plain_images(model, OPTIONS, 3, silent), reference)
    assert whole.keys() == {"fid", "kid", "precision", "recall"}
    assert parts == pytest.approx(whole, rel=2e-3)
    assert values(plain_images(model, OPTIONS, 4, silent), reference) != pytest.approx(whole, rel=2e-3)


def test_the_order_changes_no_metric(reference: Reference) -> None:
    images = digits()[1::30] / 2 + 0.5
    assert values(images.flip(0), reference) == pytest.approx(values(images, reference), rel=1e-9)


def test_a_set_against_itself_is_perfect(reference: Reference) -> None:
    found = quality(digits()[::4] / 2 + 0.5, reference, CHOSEN, OPTIONS, seed=0)
    assert found["fid"].value == pytest.approx(0, abs=1e-9)
    assert found["kid"].value < 0
    assert found["precision"].value == found["recall"].value == 1


def test_precision_and_recall_fall_with_other_pictures(reference: Reference) -> None:
    noise = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    ones = digits()[:1] / 2 + 0.5 + 0.01 * noise
    assert values(noise, reference)["precision"] < 0.5
    single = values(ones.clamp(0, 1), reference)
    assert single["precision"] > 0.8 and single["recall"] < 0.1


def test_every_metric_has_n_an_interval_and_its_basis(reference: Reference) -> None:
    found = quality(digits()[1::30] / 2 + 0.5, reference, CHOSEN, OPTIONS, seed=0)
    assert {name: item.n for name, item in found.items()} == {
        "fid": 60, "kid": 60, "precision": 60, "recall": len(digits()[::4]),
    }  # fmt: skip
    assert all(item.low <= item.value <= item.high and item.low < item.high for item in found.values())
    assert {item.basis for item in found.values()} == {basis(CHOSEN, "digits")}
    assert CHOSEN.sha256[:16] in basis(CHOSEN, "digits")


def test_statistics_without_features_give_the_fid_alone(reference: Reference) -> None:
    images = digits()[1::30] / 2 + 0.5
    bare = Reference(gaussian=gaussian(CHOSEN.apply(digits()[::4] / 2 + 0.5)), name="bare", basis="bare")
    found = quality(images, bare, CHOSEN, OPTIONS, seed=0)
    assert found.keys() == {"fid"}
    assert found["fid"].value == pytest.approx(values(images, reference)["fid"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "number"),
    [("samples", 3), ("triggered_samples", 1), ("other_samples", -1), ("resamples", 1), ("sample_steps", 0)],
)
def test_fewer_samples_than_a_metric_needs_are_refused(name: str, number: int) -> None:
    check_counts(OPTIONS)
    with pytest.raises(InputError, match=rf"evaluation\.{name} is {number}; expected at least {number + 1}"):
        check_counts(dataclasses.replace(OPTIONS, **{name: number}))


@pytest.mark.parametrize("changes", [{"asr_threshold": 0.0}, {"asr_thresholds": (0.1, 1.5)}])
def test_thresholds_that_are_no_errors_of_pictures_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="asr_threshold"):
        check_counts(dataclasses.replace(OPTIONS, **changes))
