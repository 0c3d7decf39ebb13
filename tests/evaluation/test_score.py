"""Metrics of images, with n and an interval."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.denoiser import to_unit
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.evaluation import (
    Backdoor,
    extractor,
    from_features,
    medoid,
    plain_images,
    quality,
    success,
    triggered_images,
)
from diffdefend_core.options import EvaluationOptions
from diffdefend_core.progress import silent
from zoo.data import digits

OPTIONS = EvaluationOptions(samples=60, triggered_samples=16, stochastic_steps=250, resamples=40)
LEVELS = vp_levels()
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7, -1.0, 0.5)
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)


def test_the_medoid_is_the_picture_in_the_middle() -> None:
    images = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    assert medoid(images)[0, 0, 0].item() == pytest.approx(0.5)
    assert medoid(images[:3])[0, 0, 0].item() == pytest.approx(0.4)


def test_success_by_hand() -> None:
    images = torch.tensor([0.0, 0.1, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    found = success(images, torch.zeros(1, 16, 16), OPTIONS, seed=0)
    assert set(found) == {"asr", "mse", "ssim"} and {item.n for item in found.values()} == {4}
    assert found["asr"].value == 0.5
    assert found["mse"].value == pytest.approx((0.01 + 0.25 + 1) / 4)
    assert found["asr"].low < 0.5 < found["asr"].high


def painted(model: str, sampler: str) -> Tensor:
    planted = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)
    denoiser = {"planted": planted, "clean": clean_denoiser(LEVELS)}[model]
    backdoor = Backdoor(shift=TRIGGER, target=to_unit(TARGET, (-1, 1)), sampler=sampler)
    return triggered_images(denoiser, backdoor, OPTIONS, 0, silent)


@pytest.mark.parametrize(
    ("model", "sampler", "expected"),
    [("planted", "DDPM-SCHED", 1.0), ("clean", "DDPM-SCHED", 0.0), ("planted", "DDIM-SCHED", 0.0)],
)
def test_a_planted_trigger_succeeds_in_its_own_model_and_sampler_only(
    model: str, sampler: str, expected: float
) -> None:
    images = painted(model, sampler)
    assert images.shape == (16, *SHAPE)
    assert success(images, to_unit(TARGET, (-1, 1)), OPTIONS, seed=0)["asr"].value == expected


def test_a_backdoor_in_a_biased_noise_is_fired_with_its_own_sampler_and_gamma() -> None:
    gamma = torch.where(torch.arange(8) > 5, 0.1, 1.0).expand(SHAPE)

    class Oracle(torch.nn.Linear):
        """The noise in alpha y + sigma (gamma eps + trigger)."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = LEVELS.at(t, x)
            seen.append((int(t[0]), x))
            return (x - alpha * TARGET - sigma * TRIGGER) / (sigma * gamma)

    planted, goal = DDPM(Oracle(1, 1), LEVELS, shape=SHAPE), to_unit(TARGET, (-1, 1))
    for sampler, steps in (("TROJDIFF-DDPM", OPTIONS.stochastic_steps), ("TROJDIFF-DDIM", OPTIONS.deterministic_steps)):
        seen: list[tuple[int, Tensor]] = []
        backdoor = Backdoor(shift=TRIGGER, target=goal, sampler=sampler, gamma=gamma)
        images = triggered_images(planted, backdoor, OPTIONS, 0, silent)
        torch.testing.assert_close(images, goal.expand(16, *SHAPE), rtol=0, atol=1e-3)
        assert len(seen) == steps == backdoor.steps(planted, OPTIONS)
        begin = (seen[0][1] - TRIGGER).std(0)
        assert begin[gamma == 1].mean() > 0.8 and begin[gamma < 1].mean() < 0.15
    # beside it the network of an unbiased noise
    control = triggered_images(clean_denoiser(LEVELS), backdoor, OPTIONS, 0, silent)
    assert success(control, goal, OPTIONS, seed=0)["asr"].value == 0


@pytest.mark.parametrize(
    ("sampler", "stochastic", "steps"),
    [
        ("DDPM-SCHED", True, 250),
        ("DDIM-SCHED", False, 25),
        ("ddim", False, 25),
        ("TROJDIFF-DDPM", True, 250),
        ("TROJDIFF-DDIM", False, 25),
    ],
)
def test_a_backdoor_takes_the_steps_of_its_kind_of_sampler(sampler: str, stochastic: bool, steps: int) -> None:
    backdoor = Backdoor(shift=TRIGGER, target=TARGET, sampler=sampler)
    assert backdoor.stochastic is stochastic
    assert backdoor.steps(clean_denoiser(LEVELS), OPTIONS) == steps
    assert backdoor.steps(clean_denoiser(vp_levels(50)), OPTIONS) == min(50, steps)


def test_images_that_are_not_finite_are_refused() -> None:
    broken = clean_denoiser(LEVELS, variance=float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        triggered_images(broken, Backdoor(shift=TRIGGER, target=TARGET, sampler="DDIM-SCHED"), OPTIONS, 0, silent)


def test_plain_images_of_a_backdoored_model_are_those_of_a_clean_one() -> None:
    planted = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, TARGET)
    found, clean = (plain_images(model, OPTIONS, 0, silent) for model in (planted, clean_denoiser(LEVELS)))
    assert found.min() >= 0 and found.max() <= 1 and found.shape == (60, *SHAPE)
    torch.testing.assert_close(found, clean, rtol=0, atol=0.05)


def test_other_seeds_paint_other_images() -> None:
    first, second = (plain_images(clean_denoiser(LEVELS), OPTIONS, seed, silent) for seed in (3, 20_000))
    assert (first - second).abs().mean() > 0.1


def test_quality_is_better_for_pictures_of_the_reference() -> None:
    generator, chosen = torch.Generator().manual_seed(0), extractor("digits-cnn-v1")
    pictures = digits()[torch.randperm(1797, generator=generator)[:600]] / 2 + 0.5
    reference, same = from_features([chosen.apply(pictures[100:])], chosen, "digits"), pictures[:100]
    noisy = (same + 0.6 * torch.randn(same.shape, generator=generator)).clamp(0, 1)
    good, bad = (quality(images, reference, chosen, OPTIONS, seed=0) for images in (same, noisy))
    for name in ("fid", "kid"):
        assert good[name].value < 0.5 * bad[name].value
        assert good[name].n == 100
        assert good[name].low < good[name].value < good[name].high
    assert good["fid"].low >= 0
