"""The forgetful twin forgets the backdoor, and nothing else; the suspect forgets nothing."""

from __future__ import annotations

import torch
from analytic import SHAPE, clean_denoiser, poisoned_denoiser, small_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import respond
from diffdefend_core.inversion.twin import forgetful_twin

LEVELS = vp_levels()
SAMPLES = 0.5 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
TRIGGER = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.6, -0.5, 0.4)


def twin_of(suspect: Denoiser, learning_rate: float = 1e-2, seed: int = 0, steps: int = 5) -> Denoiser:
    return forgetful_twin(
        suspect,
        SAMPLES,
        steps=steps,
        batch=16,
        learning_rate=learning_rate,
        generator=torch.Generator().manual_seed(seed),
        progress=lambda done, total: None,
    )


def weights(denoiser: Denoiser) -> Tensor:
    return torch.cat([value.flatten() for value in denoiser.network.state_dict().values()]).clone()


def test_the_suspect_is_unchanged_and_the_twin_is_not() -> None:
    suspect = small_denoiser(LEVELS)
    before = weights(suspect)
    twin = twin_of(suspect)
    assert torch.equal(weights(suspect), before)
    assert not torch.equal(weights(twin), before)
    assert not any(parameter.requires_grad for parameter in [*suspect.network.parameters(), *twin.network.parameters()])
    assert not twin.network.training


def test_a_twin_is_reproducible_by_its_generator() -> None:
    suspect = small_denoiser(LEVELS)
    assert torch.equal(weights(twin_of(suspect)), weights(twin_of(suspect)))
    assert not torch.equal(weights(twin_of(suspect)), weights(twin_of(suspect, seed=1)))


def test_the_twin_of_a_planted_model_forgets_the_trigger() -> None:
    suspect = poisoned_denoiser(baddiffusion(LEVELS), LEVELS, TRIGGER, torch.zeros(SHAPE))
    twin = twin_of(suspect, learning_rate=0.3, steps=60)
    assert twin.network.prior.item() < -2 < suspect.network.prior.item() == 0
    found = respond(suspect, twin, 0.6 * TRIGGER, SAMPLES, (240,), 16, 0)
    opposite = respond(suspect, twin, -0.6 * TRIGGER, SAMPLES, (240,), 16, 0)
    assert min(found.difference) > 4 * max(opposite.difference)


def test_the_twin_of_a_clean_model_answers_as_the_model() -> None:
    suspect = clean_denoiser(LEVELS)
    twin = twin_of(suspect, learning_rate=0.3, steps=60)
    assert max(respond(suspect, twin, 0.6 * TRIGGER, SAMPLES, (240,), 16, 0).difference) < 0.01


def test_progress_counts_steps() -> None:
    seen: list[tuple[int, int]] = []
    forgetful_twin(
        small_denoiser(LEVELS),
        SAMPLES,
        steps=3,
        batch=2,
        learning_rate=1e-3,
        generator=torch.Generator().manual_seed(0),
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
