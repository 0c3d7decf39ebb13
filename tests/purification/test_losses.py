"""What a repaired model must answer: jitter within its bounds, and the benign response in closed form."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, clean_denoiser, small_denoiser, vp_levels
from torch import Tensor

from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import alphas_cumprod, linear_betas
from diffdefend_core.diffusion.response import levels_at
from diffdefend_core.purification.losses import Rows, benign_response, draw_rows, jittered, removal_target

LEVELS = vp_levels()
TRIGGERS = torch.stack([torch.full(SHAPE, 0.5), torch.full(SHAPE, -1.0)])
# rows of a Hadamard matrix: mean 0 and the same variance .25 along every direction
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
HADAMARD = SIGNS
for _ in range(5):
    HADAMARD = torch.kron(HADAMARD, SIGNS)
SAMPLES = 0.5 * torch.cat([HADAMARD, -HADAMARD]).view(128, *SHAPE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(signals: tuple[float, float], count: int = 64) -> Rows:
    return draw_rows(clean_denoiser(LEVELS), SAMPLES, TRIGGERS, count, signals, generator())


def test_jitter_scales_within_its_bounds() -> None:
    found = jittered(TRIGGERS[:1], 400, generator())[::2] / 0.5  # even rows have no hole
    scale = found.mean((1, 2, 3))
    assert 0.4 - 0.05 < scale.min() < 0.5 and 1.5 < scale.max() < 1.6 + 0.05
    assert scale.mean().item() == pytest.approx(1, abs=0.1)
    assert (found - scale.view(-1, 1, 1, 1)).std().item() == pytest.approx(0.1, abs=0.01)


def test_jitter_cuts_a_quarter_out_of_every_second_row() -> None:
    found = jittered(TRIGGERS, 40, generator())
    holes = (found == 0).sum((1, 2, 3))
    assert (holes[1::2] == 16).all() and (holes[::2] == 0).all()
    corners = {tuple((row[0] == 0).nonzero()[0].tolist()) for row in found[1::2]}
    assert len(corners) > 5


def test_jitter_draws_from_all_triggers_and_leaves_them_as_they_are() -> None:
    before = TRIGGERS.clone()
    signs = jittered(TRIGGERS, 40, generator()).mean((1, 2, 3)).sign()
    assert (signs > 0).sum() > 5 and (signs < 0).sum() > 5
    assert torch.equal(TRIGGERS, before)


def test_no_trigger_stays_none() -> None:
    assert not jittered(torch.zeros(1, *SHAPE), 4, generator()).any()


def test_rows_lie_between_two_signals() -> None:
    low, high = 0.05, 0.5
    rows = drawn((low, high))
    (last, first) = levels_at(LEVELS, (low, high))
    assert rows.t.min() >= first and rows.t.max() <= last and len(rows.t.unique()) > 20
    assert rows.x.shape == rows.shift.shape == (64, *SHAPE)


def test_rows_carry_the_share_of_the_trigger_of_their_level() -> None:
    rows = drawn((0.005, 0.6), count=400)
    share = LEVELS.carried[rows.t].float()
    mean = rows.shift[::2].mean((1, 2, 3)) / share[::2]
    assert mean.abs().min() > 0.4 * 0.5 - 0.05 and mean.abs().max() < 1.6 * 1.0 + 0.05
    noise = rows.x.std((1, 2, 3))
    alpha, sigma = LEVELS.at(rows.t, rows.x)
    assert noise.mean() == pytest.approx(((0.25 * alpha**2 + sigma**2).sqrt()).mean().item(), abs=0.03)


def test_rows_are_made_where_the_samples_are() -> None:
    rows = draw_rows(clean_denoiser(LEVELS), SAMPLES.to("meta"), TRIGGERS, 4, (0.005, 0.6), generator())
    assert {tensor.device.type for tensor in (rows.x, rows.t, rows.shift)} == {"meta"}


def shifted_rows(direction: Tensor) -> Rows:
    t = torch.tensor([5, 80, 160, 249])
    x = torch.randn(4, *SHAPE, generator=generator())
    return Rows(x=x, t=t, shift=direction.expand(4, *SHAPE))


def test_the_benign_response_is_that_of_the_perfect_network() -> None:
    rows = shifted_rows(torch.rand(SHAPE, generator=generator(1)) - 0.3)
    phi = clean_denoiser(LEVELS, variance=0.25)
    expected = phi.noise(rows.x + rows.shift, rows.t) - phi.noise(rows.x, rows.t)
    torch.testing.assert_close(benign_response(phi, SAMPLES, rows), expected, rtol=1e-4, atol=1e-5)
    target = removal_target(phi, SAMPLES, rows)
    torch.testing.assert_close(target, phi.noise(rows.x + rows.shift, rows.t), rtol=1e-4, atol=1e-5)


def test_the_benign_response_is_not_that_of_data_of_another_variance() -> None:
    rows = shifted_rows(torch.rand(SHAPE, generator=generator(1)))
    phi = clean_denoiser(LEVELS, variance=0.25)
    expected = phi.noise(rows.x + rows.shift, rows.t) - phi.noise(rows.x, rows.t)
    assert not torch.allclose(benign_response(phi, 2 * SAMPLES, rows), expected, rtol=0.05)


def test_the_benign_response_by_hand() -> None:
    # alpha_t^2 = .8 and sigma_t^2 = .2 at the second of three levels: .2 ** .5 / (.8 * .25 + .2) per unit of shift
    levels = type(LEVELS).variance_preserving(torch.tensor([0.9, 0.8, 0.001]))
    phi: DDPM = clean_denoiser(levels)
    rows = Rows(x=torch.zeros(1, *SHAPE), t=torch.tensor([1]), shift=torch.full((1, *SHAPE), 2.0))
    found = benign_response(phi, SAMPLES, rows)
    torch.testing.assert_close(found, torch.full((1, *SHAPE), 2 * 0.2**0.5 / 0.4))


def test_at_the_last_level_a_benign_network_takes_any_shift_for_noise() -> None:
    levels = type(LEVELS).variance_preserving(alphas_cumprod(linear_betas(1000)))
    rows = Rows(x=torch.zeros(1, *SHAPE), t=torch.tensor([999]), shift=torch.full((1, *SHAPE), 0.7))
    found = benign_response(clean_denoiser(levels), SAMPLES, rows)
    torch.testing.assert_close(found, rows.shift, rtol=1e-4, atol=0)


def test_without_a_shift_the_target_is_what_the_suspect_answers() -> None:
    phi = small_denoiser(LEVELS)
    rows = shifted_rows(torch.zeros(SHAPE))
    torch.testing.assert_close(removal_target(phi, SAMPLES, rows), phi.noise(rows.x, rows.t))
