"""Schedules against the numbers of the papers, and levels by signal-to-noise ratio."""

from __future__ import annotations

import pytest
import torch
from analytic import PROCESSES, levels_of, vp_levels

from diffdefend_core.diffusion.levels import (
    TERMINAL_SIGNAL,
    Levels,
    alphas_cumprod,
    geometric_sigmas,
    karras_sigmas,
    linear_betas,
)
from diffdefend_core.diffusion.response import levels_at


def test_the_linear_schedule_has_the_golden_numbers() -> None:
    levels = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
    assert levels.alpha[0].item() == pytest.approx(0.99995, abs=1e-6)
    assert levels.alpha[999].item() == pytest.approx(0.0063528, abs=1e-7)
    assert 1 - levels.alpha[999].item() == pytest.approx(0.993647, abs=1e-6)


def test_alphas_cumprod_by_hand() -> None:
    assert alphas_cumprod(torch.tensor([0.5, 0.2])).tolist() == pytest.approx([0.5, 0.4])


def test_a_variance_preserving_model_preserves_the_variance() -> None:
    levels = vp_levels()
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(250, dtype=torch.float64))
    assert (levels.sigma.diff() > 0).all()


def test_at_takes_indices_to_the_shape_and_dtype_of_the_rows() -> None:
    levels = vp_levels()
    alpha, sigma = levels.at(torch.tensor([3, 249]), torch.zeros(2, 3, 4, 4))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1) and alpha.dtype == torch.float32
    assert alpha.flatten().tolist() == pytest.approx(levels.alpha[[3, 249]].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_come_in_the_dtype_of_the_input_again_and_again(dtype: torch.dtype) -> None:
    levels = vp_levels()
    for t in ([3, 249], [7, 0]):
        alpha, sigma = levels.at(torch.tensor(t), torch.zeros(2, 1, 4, 4, dtype=dtype))
        assert alpha.dtype == sigma.dtype == dtype
        torch.testing.assert_close(alpha.flatten(), levels.alpha[t].to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(sigma.flatten(), levels.sigma[t].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "sigma"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_levels_that_do_not_pair_up_are_refused(alpha: list[float], sigma: list[float]) -> None:
    with pytest.raises(ValueError, match="must be one"):
        Levels(alpha=torch.tensor(alpha), sigma=torch.tensor(sigma))


def test_levels_at_finds_the_level_of_its_own_signal() -> None:
    levels = vp_levels()
    wanted = (5, 100, 200, 249)
    signals = tuple((levels.alpha[t] / levels.sigma[t]).item() for t in wanted)
    assert levels_at(levels, signals) == wanted


def test_levels_at_ends_with_the_schedule() -> None:
    assert levels_at(vp_levels(), (1e-9, 1e9)) == (249, 0)


def test_the_same_signal_is_the_same_noise_under_another_number_of_steps() -> None:
    few, many = vp_levels(250), vp_levels(1000)
    for signal in (0.02, 0.3, 1.0):
        (t,), (u,) = levels_at(few, (signal,)), levels_at(many, (signal,))
        assert few.sigma[t].item() == pytest.approx(many.sigma[u].item(), rel=0.01)
        assert u == pytest.approx(4 * t, rel=0.02)


def test_carried_is_the_path_of_the_trigger() -> None:
    carried = Levels.variance_preserving(alphas_cumprod(linear_betas(1000))).carried
    assert carried[0] == 0
    assert carried[[300, 700, 999]].tolist() == pytest.approx([0.3723, 0.9171, 0.9936], abs=1e-4)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_where_the_noise_is_added_the_trigger_is_carried_like_it(process: str) -> None:
    levels = levels_of(process)
    assert torch.equal(levels.carried, levels.sigma)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_initial_state_is_as_large_as_the_last_level(process: str) -> None:
    levels = levels_of(process)
    assert levels.kind == {"consistency": "ve"}.get(process, process)
    assert levels.initial_scale == pytest.approx({"ve": 50, "consistency": 80}.get(process, 1))
    # a shift of the initial state arrives in full at the last level
    assert levels.carried[-1].item() == pytest.approx(levels.initial_scale, abs=0.01)


def test_the_sigmas_of_the_papers() -> None:
    geometric, karras = geometric_sigmas(2000), karras_sigmas(18)
    assert geometric[[0, -1]].tolist() == pytest.approx([0.01, 380])
    torch.testing.assert_close(geometric[1:] / geometric[:-1], torch.full((1999,), 38000 ** (1 / 1999)).double())
    # the 18 levels of Karras et al. 2022: i = 0, 1 and 17
    assert karras.flip(0)[[0, 1, 17]].tolist() == pytest.approx([80, 57.586, 0.002], rel=1e-4)
    assert (geometric.diff() > 0).all() and (karras.diff() > 0).all()


def pair(alpha: list[float], sigma: list[float]) -> Levels:
    return Levels(alpha=torch.tensor(alpha).double(), sigma=torch.tensor(sigma).double())


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [
        ([1, 1, 1], [1, 0.5, 50]),
        ([1, 1, 1], [1, 1, 50]),
        ([1, 1], [0, 50]),
        ([1, 1], [-1, 50]),
        ([1, 1], [1, float("nan")]),
        ([0.6, 0.0], [0.4, 0.0]),
    ],
)
def test_levels_that_do_not_rise_are_refused(alpha: list[float], sigma: list[float]) -> None:
    with pytest.raises(ValueError, match="do not rise"):
        pair(alpha, sigma)


@pytest.mark.parametrize("sigma", [9.9, 10.1])
def test_a_last_level_that_is_not_noise_is_refused(sigma: float) -> None:
    assert TERMINAL_SIGNAL == 0.1
    if sigma > 10:
        assert pair([1, 1], [1, sigma]).kind == "ve"
    else:
        with pytest.raises(ValueError, match=r"alpha / sigma 0\.101, at most 0\.1 is terminal noise"):
            pair([1, 1], [1, sigma])


def test_levels_of_no_known_form_are_refused() -> None:
    with pytest.raises(ValueError, match="neither variance preserving nor variance exploding nor those of a flow"):
        pair([0.9, 0.05], [0.9, 0.9])
