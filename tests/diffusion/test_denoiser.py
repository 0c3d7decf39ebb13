"""Prediction types, and copies that share nothing."""

from __future__ import annotations

import pytest
import torch
from analytic import clean_denoiser, small_denoiser, vp_levels
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import to_unit
from diffdefend_core.diffusion.families.ddpm import DDPM


class Known(nn.Module):
    """Answers what a perfect network of each prediction type answers for known x0 and eps."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_gives_back_noise_and_clean_data(prediction: str) -> None:
    levels = vp_levels()
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([2, 120, 249])
    alpha, sigma = levels.at(t, x0)
    answer = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction]
    denoiser = DDPM(Known(answer), levels, shape=(1, 4, 4), prediction=prediction)
    x = denoiser.diffuse(x0, t, eps)
    torch.testing.assert_close(x, alpha * x0 + sigma * eps)
    torch.testing.assert_close(denoiser.noise(x, t), eps)
    torch.testing.assert_close(denoiser.x0(x, t), x0)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="flow"):
        small_denoiser(vp_levels(50), prediction="flow")


def test_the_perfect_denoiser_is_better_than_one_of_another_variance() -> None:
    levels = vp_levels()
    generator = torch.Generator().manual_seed(0)
    x0, eps = 0.5 * torch.randn(500, 1, 8, 8, generator=generator), torch.randn(500, 1, 8, 8, generator=generator)
    t = torch.full((500,), 80)
    errors = []
    for variance in (0.25, 0.1, 0.6):
        denoiser = clean_denoiser(levels, variance)
        errors.append((denoiser.noise(denoiser.diffuse(x0, t, eps), t) - eps).square().mean().item())
    assert errors[0] == min(errors)


def test_a_clone_has_weights_of_its_own() -> None:
    denoiser = small_denoiser(vp_levels(50))
    twin = denoiser.clone()
    with torch.no_grad():
        twin.network.inner.weight += 1
    assert not torch.equal(twin.network.inner.weight, denoiser.network.inner.weight)
    assert twin.levels is denoiser.levels


def test_freeze_leaves_nothing_to_train() -> None:
    denoiser = small_denoiser(vp_levels(50))
    assert not denoiser.network.training
    assert not any(parameter.requires_grad for parameter in denoiser.network.parameters())


def test_to_unit_maps_and_clamps() -> None:
    assert to_unit(torch.tensor([-3.0, -1, 0, 1, 2]), (-1, 1)).tolist() == [0, 0, 0.5, 1, 1]
