"""The evaluation stage: every sampler its row, every kind of reference, and bad input that leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_pipeline
from tiny_scan import tiny_settings

from diffdefend_core.artifacts import Action, Candidate, Scorecard
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError, StoreError
from diffdefend_core.evaluation import extractor
from diffdefend_core.io import folders
from diffdefend_core.stages.evaluate import evaluate
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import load

ROOT = Path(__file__).parents[2]
SHAPE = (3, 8, 8)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A model that was kept, and the settings to evaluate it with."""

    candidate: str
    settings: Settings

    def card(self, **options: Any) -> Scorecard:
        return read_record(Scorecard, evaluate(self.candidate, settings=self.having(**options)), "scorecard")

    def having(self, **options: Any) -> Settings:
        evaluation = dataclasses.replace(self.settings.evaluation, **options)
        return self.settings.model_copy(update={"evaluation": evaluation})


@pytest.fixture(scope="module")
def kept(pristine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    place = tmp_path_factory.mktemp("evaluate")
    settings = tiny_settings(place, "shipped")
    model_uri = load(str(pristine_model), settings=settings)
    record: Candidate = sample_records.candidate(
        Action.KEEP, model_uri=model_uri, trigger_uri="file:///none/", verdict_uri="file:///none/"
    )
    (place / "keep").mkdir()
    (place / "keep" / "candidate.json").write_text(record.to_json())
    uri = f"file://{place}/store/keep/key/"
    folders.publish(place / "keep", uri, stage="keep", key="key", producer="test")
    return Kept(uri, settings)


@pytest.fixture(scope="module")
def trigger(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trigger") / "known.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {"trigger": torch.randn(SHAPE, generator=generator), "target": torch.rand(SHAPE, generator=generator)}
    save_file(tensors, path)
    return path.as_uri()


def write_images(folder: Path, count: int, size: tuple[int, int] = (8, 8), suffix: str = "png") -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return folder


def assert_refused(kept: Kept, match: str, **options: Any) -> None:
    """Assert that the evaluation is refused in one line, and that it leaves nothing."""
    place = Path(kept.settings.store.removeprefix("file://")) / "evaluate"
    before = set(place.glob("*"))
    with pytest.raises(InputError, match=match) as caught:
        evaluate(kept.candidate, settings=kept.having(**options))
    assert "\n" not in str(caught.value)
    assert set(place.glob("*")) == before


def test_a_trigger_is_fired_with_a_sampler_of_each_kind(kept: Kept, trigger: str) -> None:
    card = kept.card(known_trigger=trigger, other_samples=3)
    assert [(row.trigger, row.sampler, row.kind, row.before["asr"].n) for row in card.attacks] == [
        ("known", "DDPM-SCHED", "fires", 4),
        ("known", "DDIM-SCHED", "deterministic", 3),
        ("known", "UNIPC", "multistep", 3),
    ]
    assert card.attacks[0].before["asr"] == card.before["asr_known"]
    assert all(row.after is None and row.curve_after == () for row in card.attacks)
    assert all(len(row.curve_before) == len(card.asr_thresholds) for row in card.attacks)
    # at the threshold itself the curve is the rate
    at = card.asr_thresholds.index(card.asr_threshold)
    assert [row.curve_before[at] for row in card.attacks] == [row.before["asr"] for row in card.attacks]
    assert Scorecard.from_json(card.to_json()) == card


def test_the_other_samplers_can_be_left_out(kept: Kept, trigger: str) -> None:
    card = kept.card(known_trigger=trigger, other_samples=0)
    assert [row.kind for row in card.attacks] == ["fires"]
    dearer = kept.card(known_trigger=trigger, other_samples=3)
    assert dearer.forward_equivalents == card.forward_equivalents + 3 * 2 * 2  # 3 images, 2 samplers, 2 steps


def test_a_folder_of_images_is_a_reference(kept: Kept, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "real", 12)
    card = kept.card(reference=str(folder))
    assert card.reference.startswith("12 images of real (sha256 ")
    assert card.before.keys() == {"fid", "kid", "precision", "recall"} and card.before["recall"].n == 12
    # the same pictures as features give the same numbers
    chosen = extractor("digits-cnn-v1")
    images = torch.stack([
        torch.from_numpy(np.asarray(Image.open(folder / f"{number}.png")).copy()).permute(2, 0, 1) / 255
        for number in sorted(range(12), key=lambda number: f"{number}.png")
    ])  # fmt: skip
    np.savez(tmp_path / "real.npz", features=chosen.apply(images).numpy(), extractor=chosen.name)
    again = kept.card(reference=str(tmp_path / "real.npz"))
    for name, metric in card.before.items():
        assert again.before[name].value == pytest.approx(metric.value, rel=1e-6)
    assert again.before["fid"].basis != card.before["fid"].basis


def test_a_mean_and_a_covariance_are_a_reference_for_the_fid(kept: Kept, tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(60, 32))
    np.savez(tmp_path / "whole.npz", features=features, extractor="digits-cnn-v1")
    np.savez(tmp_path / "m.npz", mu=features.mean(0), sigma=np.cov(features.T), extractor="digits-cnn-v1")
    whole, bare = (kept.card(reference=str(tmp_path / name)) for name in ("whole.npz", "m.npz"))
    assert bare.before.keys() == {"fid"}
    # fewer images than dimensions: an eigenvalue of 0 is known to 1e-16, its root to 1e-8
    assert bare.before["fid"].value == pytest.approx(whole.before["fid"].value, rel=1e-7)
    assert any("KID, precision and recall need features" in note for note in bare.notes)


def test_a_trusted_model_is_a_reference(kept: Kept, pristine_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine_model, tmp_path / "parent"))
    moved = {name: value * 1.01 for name, value in load_file(folder / WEIGHTS).items()}
    save_file(moved, folder / WEIGHTS, {"format": "pt"})
    settings = kept.having(reference=str(folder))
    uri = evaluate(kept.candidate, settings=settings)
    card = read_record(Scorecard, uri, "scorecard")
    assert card.reference.startswith("samples of the model parent (digest ") and not card.self_reference
    assert [item.stage for item in folders.finished(uri, "evaluate").parents] == ["keep", "load"]


def test_a_model_of_another_family_or_shape_is_no_reference(kept: Kept, pristine_model: Path, tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path / "flow", "flow")
    digits = str(ROOT / "zoo" / "digits" / "base-a")
    assert_refused(kept, r"evaluation.reference is flow \(3, 8, 8\); expected ddpm", reference=str(tmp_path / "flow"))
    assert_refused(kept, r"evaluation.reference is ddpm \(1, 16, 16\); expected ddpm \(3, 8, 8\)", reference=digits)
    assert_refused(kept, "is the model itself", reference=str(pristine_model))


def test_images_that_do_not_fit_are_refused(kept: Kept, tmp_path: Path) -> None:
    assert_refused(kept, "9 x 8 pixels; expected 8 x 8", reference=str(write_images(tmp_path / "wide", 5, (9, 8))))
    assert_refused(kept, "with 3 images; expected at least 4", reference=str(write_images(tmp_path / "few", 3)))
    torn = write_images(tmp_path / "torn", 5)
    (torn / "2.png").write_bytes((torn / "2.png").read_bytes()[:60])
    assert_refused(kept, "reference image 2.png cannot be read", reference=str(torn))
    (torn / "2.png").write_bytes(b"GIF89a" + bytes(40))
    assert_refused(kept, "reference image 2.png cannot be read", reference=str(torn))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("no picture")
    assert_refused(kept, "holds no images and no model", reference=str(tmp_path / "words"))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"features": np.ones((9, 5)), "extractor": "digits-cnn-v1"}, r"shape \(9, 5\), not \[M, 32\]"),
        ({"features": np.full((9, 32), np.nan), "extractor": "digits-cnn-v1"}, "not finite"),
        ({"features": np.ones((9, 32)), "extractor": "inception-v3"}, "of extractor inception-v3; expected those of"),
        (
            {"features": np.ones((9, 32)), "extractor": "digits-cnn-v1", "extractor_sha256": "ab" * 32},
            f"with sha256 {'ab' * 32}; expected sha256 93807760",
        ),
        ({"features": np.ones((2, 32)), "extractor": "digits-cnn-v1"}, "with 2 images; expected at least 4"),
        ({"features": np.array([["a"] * 32]), "extractor": "digits-cnn-v1"}, "of type <U1"),
        ({"mu": np.ones(2048), "sigma": np.eye(2048)}, "of extractor inception-v3 .it names none"),
        ({"mu": np.ones(32), "sigma": np.ones((31, 32)), "extractor": "digits-cnn-v1"}, "no covariance"),
        ({"mu": np.ones(32), "sigma": -np.eye(32), "extractor": "digits-cnn-v1"}, "negative variances"),
        ({"mu": np.ones(32), "extractor": "digits-cnn-v1"}, "it holds mu, extractor"),
        ({"features": np.array([None]), "extractor": "digits-cnn-v1"}, "pickled objects are never loaded"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(arrays: dict[str, Any], reason: str, kept: Kept, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    assert_refused(kept, reason, reference=str(tmp_path / "reference.npz"))


def test_an_npz_that_unpacks_to_more_than_allowed_is_refused(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdefend_core.evaluation.reference.MAX_NPZ_BYTES", 10_000)
    np.savez_compressed(tmp_path / "bomb.npz", features=np.zeros((1000, 32)), extractor="digits-cnn-v1")
    assert (tmp_path / "bomb.npz").stat().st_size < 10_000
    assert_refused(kept, "unpacks to", reference=str(tmp_path / "bomb.npz"))


def test_an_extractor_of_another_digest_is_refused(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    options = {"extractor": "inception-v3", "extractor_weights": str(tmp_path / "weights.pth")}
    assert_refused(kept, "inception-v3 have sha256 [0-9a-f]{64}; expected 6726825d", **options)
    assert_refused(kept, "inception-v3 without weights", extractor="inception-v3")
    assert_refused(
        kept, "LPIPS have sha256 [0-9a-f]{64}; expected 7be5be79", lpips_weights=str(tmp_path / "weights.pth")
    )


def test_too_few_samples_are_refused_before_anything_is_painted(kept: Kept) -> None:
    assert_refused(kept, "evaluation.samples is 3; expected at least 4", samples=3)


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(kept: Kept) -> None:
    """The process may write files of a few bytes only, as on a disk that is full."""
    code = (
        "import resource, signal, sys; from diffdefend_core.cli import run_command;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64));"
        "sys.exit(run_command(sys.argv[1:]))"
    )
    place = Path(kept.settings.store.removeprefix("file://")) / "evaluate"
    before = set(place.glob("*"))
    flags = ["--set", "evaluation.samples=9", "--set", "evaluation.sample_steps=2", "--set", "evaluation.resamples=2"]
    command = ["evaluate", "--candidate", kept.candidate, "--store", kept.settings.store, "--device", "cpu", *flags]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert set(place.glob("*")) == before


def test_other_errors_are_not_taken_for_a_full_disk(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr("diffdefend_core.stages.evaluate.write_record", fail)
    with pytest.raises(PermissionError) as caught:
        kept.card(samples=10)
    assert not isinstance(caught.value, StoreError)
