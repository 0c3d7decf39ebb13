"""Images depend on the seed and their number alone."""

from __future__ import annotations

import pytest
import torch
from analytic import clean_denoiser, small_denoiser, vp_levels
from hypothesis import given
from hypothesis import strategies as st

import diffdefend_core.diffusion.generate as module
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.diffusion.generate import BATCH, generate
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS, steps_for


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_batch_size_changes_nothing(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = small_denoiser(vp_levels(50))
    few = generate(denoiser, 5, sampler=sampler, steps=4, seed=3)
    many = generate(denoiser, BATCH + 2, sampler=sampler, steps=4, seed=3)
    monkeypatch.setattr(module, "BATCH", 2)
    in_parts = generate(denoiser, 5, sampler=sampler, steps=4, seed=3)
    assert many.shape == (BATCH + 2, *denoiser.shape)
    torch.testing.assert_close(few, many[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few, in_parts, rtol=1e-4, atol=1e-4)


def test_rows_and_seeds_have_noise_of_their_own() -> None:
    first, second = standard_normal(generators(0, 3), (1, 4, 4)), standard_normal(generators(1, 3), (1, 4, 4))
    rows = torch.cat([first, second]).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == 6
    torch.testing.assert_close(standard_normal(generators(0, 1, start=2), (1, 4, 4))[0], first[2])


@given(first=st.integers(0, 50_000), second=st.integers(0, 50_000))
def test_the_streams_of_two_seeds_share_no_sample(first: int, second: int) -> None:
    starts = [stream[0].initial_seed() for stream in (generators(first, 1), generators(second, 1))]
    gap = abs(starts[0] - starts[1])
    assert first == second or min(gap, 2**32 - gap) > 50_000


def test_the_noise_is_standard_normal() -> None:
    noise = standard_normal(generators(0, 500), (1, 8, 8))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_a_shift_is_added_to_the_initial_noise() -> None:
    denoiser = clean_denoiser(Levels.variance_preserving(torch.tensor([0.9, 0.009])))
    shift = torch.linspace(-1, 1, 64).view(1, 8, 8)
    plain, shifted, zero = (
        generate(denoiser, 2, sampler="ddim", steps=1, seed=0, shift=tau) for tau in (None, shift, torch.zeros(1, 8, 8))
    )
    alpha, sigma = denoiser.levels.alpha[-1].item(), denoiser.levels.sigma[-1].item()
    per_unit = alpha * 0.25 / (0.25 * alpha**2 + sigma**2)  # of the posterior mean, the first and only step
    torch.testing.assert_close(shifted - plain, per_unit * shift.expand(2, 1, 8, 8), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(plain, zero)


def test_the_initial_state_of_an_exploding_model_is_as_large_as_its_last_sigma() -> None:
    sigma = torch.tensor([0.5, 2.0, 80.0], dtype=torch.float64)

    class Sees(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.setdefault(int(t[0]), x)
            return -x / sigma[t].view(-1, 1, 1, 1).to(x) ** 2

    seen: dict[int, torch.Tensor] = {}
    network = Sees()
    network.register_parameter("nothing", torch.nn.Parameter(torch.zeros(())))
    denoiser = NCSN(network, Levels.variance_exploding(sigma), shape=(1, 8, 8))
    generate(denoiser, 64, sampler="edm-ve-ode", steps=3, seed=0)
    assert seen[2].std().item() == pytest.approx(80, rel=0.05)


def test_a_model_of_few_levels_is_sampled_in_all_of_them() -> None:
    denoiser = clean_denoiser(vp_levels(50))
    entry = SAMPLERS["DDIM-SCHED"]
    assert (steps_for(denoiser, entry, 80), steps_for(denoiser, entry, 7)) == (50, 7)


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    denoiser = clean_denoiser(vp_levels(50))
    generate(denoiser, BATCH + 1, sampler="ddim", steps=1, seed=0, progress=lambda *step: seen.append(step))
    assert seen == [(BATCH, BATCH + 1), (BATCH + 1, BATCH + 1)]
