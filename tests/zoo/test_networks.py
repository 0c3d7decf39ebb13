"""Models of every family: what is written as a pipeline of diffusers is read, and loaded by the scanner, as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.loading.build import load_denoiser
from zoo.networks import EDM_SIGMAS, SIGMAS, Model, read, save, untrained
from zoo.recipes import Recipe

SIZE, CHANNELS = 16, (4, 8)
FAMILIES = {"ddpm": "vp", "ncsn": "ve", "flow": "flow", "consistency": "consistency", "ldm": "vp"}
# the share of two answers that float16 weights may differ by
HALF = 0.02


def design(family: str, **more: Any) -> Recipe:
    return Recipe(name="tiny", seed=0, family=family, channels=CHANNELS, **more)


def model(family: str, seed: int = 0) -> Model:
    built = untrained(design(family), SIZE, seed)
    if built.autoencoder is not None:
        built.scale_latents(torch.rand(32, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1)
        built.autoencoder.eval().requires_grad_(False)
    built.denoiser.freeze()
    return built


def answers(given: Model | Denoiser) -> torch.Tensor:
    """Return what a network answers to the same rows at low, middle and high noise, each of rms 1."""
    denoiser = given.denoiser if isinstance(given, Model) else given
    count = len(denoiser.levels)
    t = torch.tensor([1, count // 2, count - 1])
    x0, eps = torch.randn(2, 3, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    x = denoiser.diffuse(x0, t, eps)
    found: torch.Tensor = denoiser.network(x, t)
    return found / found.square().mean((1, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_family_and_the_levels_it_is_named_for(family: str) -> None:
    denoiser = model(family).denoiser
    assert (denoiser.family, denoiser.process) == (family, FAMILIES[family])
    assert denoiser.picture_shape == (1, SIZE, SIZE)
    assert denoiser.value_range == ((0.0, 1.0) if family == "ncsn" else (-1.0, 1.0))
    ends = denoiser.levels.sigma[[0, -1]].tolist()
    if family != "ddpm" and family != "ldm":
        assert ends == pytest.approx({"ncsn": SIGMAS, "consistency": EDM_SIGMAS, "flow": (0.001, 1)}[family])
    if FAMILIES[family] == "vp":
        # the schedule ends where that of DDPM ends
        assert len(denoiser.levels) == 250
        assert denoiser.levels.alpha[-1].item() == pytest.approx(0.0063, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_read_as_it_was(family: str, tmp_path: Path) -> None:
    before = model(family)
    save(design(family), before, tmp_path / "tiny")
    after = read(design(family), SIZE, tmp_path / "tiny")
    expected = answers(before)
    assert (answers(after) - expected).square().mean().sqrt() < HALF
    assert (answers(model(family, seed=4)) - expected).square().mean().sqrt() > 0.3
    assert not any(parameter.requires_grad for parameter in after.denoiser.network.parameters())
    assert before.unet.dtype == torch.float32  # what is written is a copy in half precision


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_loaded_by_the_scanner_as_it_was(family: str, tmp_path: Path) -> None:
    before = model(family)
    save(design(family), before, tmp_path / "tiny")
    loaded, own = load_denoiser(tmp_path / "tiny"), before.denoiser
    for name in ("family", "process", "shape", "picture_shape", "value_range", "clean_range"):
        assert getattr(loaded, name) == getattr(own, name), name
    torch.testing.assert_close(loaded.levels.sigma, own.levels.sigma, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loaded.levels.alpha, own.levels.alpha, rtol=1e-4, atol=1e-6)
    assert (answers(loaded) - answers(before)).square().mean().sqrt() < HALF
    pictures = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.testing.assert_close(loaded.encode(pictures), own.encode(pictures), rtol=0, atol=0.05)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_another_design_is_loaded_by_the_scanner_as_it_was(prediction: str, attention: bool, tmp_path: Path) -> None:
    other = design("ddpm", prediction=prediction, levels=40, cosine=attention, attention=attention)
    before = untrained(other, SIZE, 0)
    before.denoiser.freeze()
    save(other, before, tmp_path / "tiny")
    loaded, own = load_denoiser(tmp_path / "tiny"), before.denoiser
    assert len(loaded.levels) == 40
    torch.testing.assert_close(loaded.levels.alpha, own.levels.alpha, rtol=1e-4, atol=1e-6)
    x, t = torch.randn(3, *own.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 15, 25])
    torch.testing.assert_close(loaded.noise(x, t), own.noise(x, t), rtol=0.02, atol=0.02)
    assert any("attentions" in name for name, _ in before.unet.named_parameters()) is attention


def test_the_latents_of_the_data_have_unit_variance() -> None:
    built = untrained(design("ldm"), SIZE, 0)
    pictures = torch.rand(64, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = built.denoiser.encode(pictures).std().item()
    built.scale_latents(pictures)
    assert before != pytest.approx(1, abs=0.05)
    assert built.denoiser.encode(pictures).std().item() == pytest.approx(1, abs=0.01)
    assert built.autoencoder is not None
    assert built.autoencoder.config.scaling_factor == built.denoiser.scaling_factor


def test_the_seed_makes_the_network() -> None:
    first, again, other = (untrained(design("ddpm"), SIZE, seed).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
