"""The known trigger of a red-team model: fired as its file says, and refused if it belongs to another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sample_records
import torch
from safetensors.torch import load_file, save_file
from tiny_scan import tiny_settings
from torch import Tensor

from diffdefend_core.artifacts import Action, Candidate, Scorecard
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.errors import InputError
from diffdefend_core.io import folders
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.stages.evaluate import evaluate
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import load

SHAPE = (3, 8, 8)
GENERATOR = torch.Generator().manual_seed(0)
TRIGGER, TARGET = torch.randn(SHAPE, generator=GENERATOR), torch.rand(SHAPE, generator=GENERATOR) * 2 - 1
GAMMA = torch.where(torch.arange(8) > 5, 0.1, 1.0).expand(SHAPE).contiguous()


@dataclasses.dataclass(frozen=True)
class Kept:
    """A model that was kept, and the settings to evaluate it with."""

    candidate: str
    settings: Settings

    def with_known(self, path: Path) -> Settings:
        evaluation = dataclasses.replace(self.settings.evaluation, known_trigger=path.as_uri())
        return self.settings.model_copy(update={"evaluation": evaluation})


@pytest.fixture(scope="module")
def kept(pristine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    place = tmp_path_factory.mktemp("known")
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


def write(path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor) -> Path:
    save_file({"trigger": TRIGGER, "target": TARGET} | tensors, path, metadata)
    return path


def painted(model: Path, sampler: str, gamma: Tensor | float, steps: int, seed: int) -> Tensor:
    """Return what the model paints under the trigger, in [0, 1]."""
    denoiser = load_denoiser(model)
    images = generate(denoiser, 4, sampler=sampler, steps=steps, seed=seed, shift=TRIGGER, gamma=gamma)
    return denoiser.pictures(images)


@pytest.mark.parametrize(
    ("metadata", "tensors", "sampler", "gamma", "steps"),
    [
        ({"sampler": "TROJDIFF-DDIM"}, {"gamma": GAMMA}, "TROJDIFF-DDIM", GAMMA, 2),
        ({"sampler": "TROJDIFF-DDPM"}, {"gamma": GAMMA}, "TROJDIFF-DDPM", GAMMA, 4),
        ({"sampler": "ddim"}, {"gamma": GAMMA}, "DDIM-SCHED", GAMMA, 2),
        ({"sampler": "DDIM-SCHED"}, {}, "DDIM-SCHED", 1.0, 2),
        (None, {}, "DDPM-SCHED", 1.0, 4),
    ],
    ids=["own-ddim", "own-ddpm", "gamma", "table", "old-file"],
)
def test_a_known_trigger_is_fired_as_its_file_says(
    metadata: dict[str, str] | None, tensors: dict[str, Tensor], sampler: str, gamma: Tensor | float, steps: int,
    kept: Kept, pristine_model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    settings = kept.with_known(write(tmp_path / "known.safetensors", metadata, **tensors))
    uri = evaluate(kept.candidate, settings=settings)
    card = read_record(Scorecard, uri, "scorecard")
    assert card.samplers["known"] == sampler
    folders.fetch(uri, tmp_path / "into")
    images = load_file(tmp_path / "into" / "samples.safetensors")["triggered_known/before"]
    expected = painted(pristine_model, sampler, gamma, steps, settings.seed + 4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    error = (expected - (TARGET + 1) / 2).square().mean().item()
    assert card.before["mse_known"].value == pytest.approx(error, rel=1e-3)
    assert {"asr_known", "ssim_known"} <= set(card.before)


def test_another_gamma_or_sampler_paints_other_images(pristine_model: Path) -> None:
    images = [
        painted(pristine_model, sampler, gamma, 2, 4)
        for sampler, gamma in (("TROJDIFF-DDIM", GAMMA), ("TROJDIFF-DDIM", 1.0), ("DDIM-SCHED", GAMMA))
    ]
    assert min((images[0] - other).abs().max() for other in images[1:]) > 0.01


@pytest.mark.parametrize(
    "tensors",
    [
        {"gamma": torch.ones(1, 8, 8)},
        {"gamma": torch.tensor(0.6)},
        {"trigger": torch.ones(1, 8, 8)},
        {"target": torch.ones(3, 16, 16)},
    ],
    ids=["gamma-of-another-shape", "one-gamma", "trigger", "target"],
)
def test_a_file_of_another_shape_is_refused(tensors: dict[str, Tensor], kept: Kept, tmp_path: Path) -> None:
    path = write(tmp_path / "known.safetensors", {"sampler": "TROJDIFF-DDIM"}, **tensors)
    with pytest.raises(InputError, match=r"known trigger .*expected .*`trigger` \(and `gamma`\) \(3, 8, 8\)") as caught:
        evaluate(kept.candidate, settings=kept.with_known(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "reason"), [("MAGIC", "sampler 'MAGIC'"), ("SCORE-SDE-VE", "sampler SCORE-SDE-VE with a model")]
)
def test_a_sampler_that_does_not_fit_is_refused(sampler: str, reason: str, kept: Kept, tmp_path: Path) -> None:
    path = write(tmp_path / "known.safetensors", {"sampler": sampler})
    with pytest.raises(InputError, match=reason):
        evaluate(kept.candidate, settings=kept.with_known(path))
