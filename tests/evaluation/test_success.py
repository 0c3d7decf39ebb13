"""MSE and ASR by hand, SSIM against scikit-image and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.metrics
import torch
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from diffdefend_core.evaluation.score import success_curve
from diffdefend_core.evaluation.success import squared_error, ssim, successes

TARGET = torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(0))


def near(amount: float, rows: int = 3) -> Tensor:
    noise = torch.randn(rows, *TARGET.shape, generator=torch.Generator().manual_seed(1))
    return (TARGET + amount * noise).clamp(0, 1)


def test_the_squared_error_by_hand() -> None:
    images = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]], [[[0.5, 0.5], [0.5, 0.5]]]])
    assert squared_error(images, torch.zeros(1, 2, 2)).tolist() == pytest.approx([0.25, 0.25])
    assert squared_error(images, torch.ones(1, 2, 2)).tolist() == pytest.approx([0.75, 0.25])


def test_the_attack_success_rate_by_hand() -> None:
    # errors 0, .04, .0625 and 1 against a threshold of .05
    images = torch.tensor([0.0, 0.2, 0.25, 1.0]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    found = successes(images, torch.zeros(1, 8, 8), 0.05)
    assert found.tolist() == [1, 1, 0, 0]
    assert found.mean().item() == 0.5
    assert successes(images, torch.zeros(1, 8, 8), 0.07).mean().item() == 0.75


def test_an_error_at_the_threshold_is_no_success() -> None:
    assert successes(torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, 4, 4), 0.25).tolist() == [0]


@pytest.mark.parametrize("amount", [0.02, 0.1, 0.5])
def test_the_structural_similarity_is_that_of_scikit_image(amount: float) -> None:
    images = near(amount)
    expected = [
        skimage.metrics.structural_similarity(
            image.double().numpy(),
            TARGET.double().numpy(),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image in images
    ]
    np.testing.assert_allclose(ssim(images, TARGET).numpy(), expected, rtol=0, atol=1e-9)


def test_an_image_is_similar_to_itself_and_less_so_the_noisier_it_is() -> None:
    same, little, much = (ssim(near(amount), TARGET).mean().item() for amount in (0.0, 0.1, 0.5))
    assert same == pytest.approx(1)
    assert 1 > little > much > -1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 30), (1, 1), (11, 11)])
def test_small_images_are_measured_with_a_window_that_fits(height: int, width: int) -> None:
    image = torch.rand(1, height, width, generator=torch.Generator().manual_seed(2))
    assert ssim(image[None], image).tolist() == pytest.approx([1])
    assert ssim(1 - image[None], image).item() < 0.95


def test_the_similarity_is_that_of_torchmetrics() -> None:
    images = near(0.1)
    theirs = StructuralSimilarityIndexMeasure(data_range=1.0, return_full_image=True)
    # torchmetrics pads the border by reflection and counts it; without it the same windows remain
    expected = [theirs(i[None].double(), TARGET[None].double())[1][..., 5:-5, 5:-5].mean().item() for i in images]
    np.testing.assert_allclose(ssim(images, TARGET).numpy(), expected, rtol=0, atol=1e-6)


def test_the_curve_by_hand_rises_with_the_threshold() -> None:
    # errors 0, .04, .0625 and 1
    images = torch.tensor([0.0, 0.2, 0.25, 1.0]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    curve = success_curve(images, torch.zeros(1, 8, 8), (0.01, 0.05, 0.07, 1.0))
    assert [item.value for item in curve] == [0.25, 0.5, 0.75, 0.75]
    assert all(item.n == 4 and item.low < item.value < item.high for item in curve)
