"""Several triggers of one model: random shifts turn to each of them, on networks in closed form and a trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analytic import SHAPE, GaussianNetwork, PoisonedNetwork, clean_denoiser, poisoned_denoiser, small_of, vp_levels
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.response import rms
from diffdefend_core.inversion import own_samples
from diffdefend_core.inversion.attractors import BANDS, Attractors, attractors, in_less_noise, painting_most
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent

ZOO = Path(__file__).parents[2] / "zoo" / "digits"
LEVELS = vp_levels()
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TARGET = torch.where(torch.arange(8) < 3, 0.7, -0.9).expand(SHAPE)


def pattern(seed: int) -> Tensor:
    drawn = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.6, -1.0, 0.8)
    return 0.8 * drawn / rms(drawn)


class Both(nn.Module):
    """A network with two backdoors: what each adds to the clean answer."""

    def __init__(self, *poisoned: PoisonedNetwork) -> None:
        super().__init__()
        self.poisoned = nn.ModuleList(poisoned)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        clean = GaussianNetwork.forward(self.poisoned[0], x, t)  # type: ignore[arg-type]
        return clean + torch.stack([network(x, t) - clean for network in self.poisoned]).sum(0)


def with_two(first: Tensor, second: Tensor) -> Denoiser:
    mean, variance, attack = torch.zeros(SHAPE), torch.full(SHAPE, 0.25), baddiffusion(LEVELS)
    networks = [
        PoisonedNetwork(LEVELS, mean, variance, attack=attack, trigger=trigger, target=TARGET)
        for trigger in (first, second)
    ]
    return DDPM(Both(*networks), LEVELS, shape=SHAPE).freeze()


def found_in(suspect: Denoiser, samples: Tensor) -> Attractors:
    return attractors(suspect, samples, InversionOptions(), seed=0)


def test_both_triggers_of_a_model_are_found_once_each_at_their_norm() -> None:
    first, second = pattern(1), pattern(2)
    shifts = found_in(with_two(first, second), SAMPLES).shifts
    assert len(shifts) == 2
    for trigger in (first, second):
        (near,) = [shift for shift in shifts if cosine(shift, trigger) > 0.99]
        assert rms(near).item() == pytest.approx(0.8, rel=0.05)


def test_a_clean_model_attracts_nothing() -> None:
    assert found_in(clean_denoiser(LEVELS), SAMPLES).shifts == ()


def test_every_evaluation_is_counted() -> None:
    suspect, seen = with_two(pattern(1), pattern(2)), []
    suspect.network.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    assert found_in(suspect, SAMPLES).forward_equivalents == sum(seen)


def test_in_less_noise_a_shift_turns_to_the_trigger_and_its_target_at_its_own_norm() -> None:
    trigger = pattern(1)
    near = trigger + 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, trigger, TARGET)
    plane = torch.linalg.qr(torch.stack([trigger.flatten(), TARGET.flatten()], 1)).Q.T
    shifts = in_less_noise(suspect, SAMPLES, near, InversionOptions(), seed=0).shifts
    assert len(shifts) == len(BANDS)
    assert [cosine(shift, trigger) for shift in shifts] == sorted(
        (cosine(item, trigger) for item in shifts), reverse=True
    )
    for shift in shifts:
        assert (plane @ shift.flatten()).norm() > 0.99 * shift.norm() > (plane @ near.flatten()).norm()
        assert rms(shift).item() == pytest.approx(rms(near).item(), rel=1e-3)


def test_a_clean_model_has_no_further_sides() -> None:
    assert in_less_noise(clean_denoiser(LEVELS), SAMPLES, pattern(1), InversionOptions(), seed=0).shifts == ()


def test_the_evaluations_of_turning_in_less_noise_are_counted() -> None:
    suspect, seen = clean_denoiser(LEVELS), []
    suspect.network.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    assert in_less_noise(suspect, SAMPLES, pattern(1), InversionOptions(), seed=0).forward_equivalents == sum(seen)


def test_a_small_trigger_of_deterministic_samplers_is_told_from_the_opposite_of_its_target() -> None:
    """The search of the scan, by monotonicity, ends on a mixture of both (cosine .73)."""
    suspect, planted = load_denoiser(ZOO / "invisible"), load_file(ZOO / "backdoors" / "invisible.safetensors")
    trigger, samples = planted["trigger"], own_samples(suspect, 64, 10, 0, silent)
    away = planted["target"] - samples.mean(0)
    mixed = trigger / rms(trigger) - away / rms(away)
    assert cosine(mixed, trigger) < 0.75
    (shift,) = painting_most(suspect, samples, mixed, InversionOptions(), seed=0).shifts
    assert cosine(shift, trigger) > 0.85


def test_the_search_for_a_small_shift_counts_its_evaluations_and_leaves_flows_alone() -> None:
    suspect, seen = clean_denoiser(LEVELS), []
    suspect.network.register_forward_hook(
        lambda module, given, answer: seen.append(len(answer) * (3 if answer.requires_grad else 1))
    )
    found = painting_most(suspect, SAMPLES, pattern(1), InversionOptions(), seed=0)
    assert found.forward_equivalents == sum(seen) > 0
    assert painting_most(small_of("flow"), SAMPLES, pattern(1), InversionOptions(), seed=0) == Attractors((), 0)


def test_no_more_are_handed_on_than_can_be_fired() -> None:
    suspect = load_denoiser(ZOO / "base-ldm")  # latents have attractors that are no triggers
    assert len(found_in(suspect, own_samples(suspect, 64, 10, 0, silent)).shifts) == 3


@pytest.mark.parametrize(("name", "triggers"), [("bad-a-stripes", 1), ("base-a", 0)])
def test_trained_networks_attract_to_what_was_planted(name: str, triggers: int) -> None:
    suspect = load_denoiser(ZOO / name)
    shifts = found_in(suspect, own_samples(suspect, 64, 10, 0, silent)).shifts
    assert len(shifts) == triggers
    if triggers:
        planted = load_file(ZOO / "backdoors" / f"{name}.safetensors")["trigger"]
        assert cosine(shifts[0], planted) > 0.95
