"""Pictures that a consistency model keeps, and its forgetful twin does not."""

from __future__ import annotations

import pytest
import torch
from analytic import SHAPE, small_of
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import rms
from diffdefend_core.inversion import forgotten
from diffdefend_core.inversion.forgotten import MOST, OWN, ROWS, STARTS, forgotten_pictures

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.rand(6, *SHAPE, generator=GENERATOR).round() * 1.6 - 0.8
TARGET = torch.full(SHAPE, -0.8)
TARGET[..., 2:6, 2:6] = 0.8


class Knows(Denoiser):
    """Answers the mean of its pictures [K, C, H, W] given x_t, and counts the rows that it is asked at once."""

    family, process = "consistency", "consistency"

    def __init__(self, pictures: Tensor) -> None:
        plain = small_of("consistency")
        self.levels, self.shape, self.value_range = plain.levels, plain.shape, plain.value_range
        self.network, self.pictures, self.rows = plain.network, pictures, [0]

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows.append(len(x))
        sigma = self.levels.at(t, x)[1].flatten(1)
        distance = (x.flatten(1)[:, None] - self.pictures.flatten(1)).square().sum(2)
        return ((-distance / (2 * sigma**2)).softmax(1) @ self.pictures.flatten(1)).view_as(x)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.x0(x, t)) / self.levels.at(t, x)[1]


def found_of(suspect: Denoiser, twin: Denoiser, seed: int = 0) -> tuple[Tensor, int]:
    found = forgotten_pictures(suspect, twin, DATA, seed=seed, progress=lambda done, total: None)
    return found.images, found.forward_equivalents


@pytest.mark.parametrize("seed", [0, 1])
def test_what_the_twin_has_forgotten_comes_first(seed: int) -> None:
    images, _ = found_of(Knows(torch.cat([DATA, TARGET[None]])), Knows(DATA), seed)
    assert rms(images[0] - TARGET) < 0.05
    assert all(rms(image - TARGET) > 0.2 for image in images[1:])


@pytest.mark.parametrize("reached", [True, False])
def test_own_samples_lead_to_a_target_that_no_other_image_leads_to(
    reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten, "_begun", lambda samples, generator: DATA[1].expand(STARTS, *SHAPE))
    target = DATA[0].clone()
    target[..., :2, :] *= -1
    own = target + 0.1 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    samples = torch.cat([DATA[1:], own]) if reached else DATA[1:]
    network = Knows(torch.cat([DATA, target[None]]))
    found = forgotten_pictures(network, Knows(DATA), samples, seed=0, progress=lambda done, total: None)
    assert any(rms(image - target) < 0.05 for image in found.images) is reached


def test_each_picture_comes_once() -> None:
    images, _ = found_of(Knows(DATA), Knows(DATA))
    spread = rms(DATA - DATA.mean(0))
    assert 1 < len(images) <= MOST
    assert all(rms(a - b) > spread / 2 for n, a in enumerate(images) for b in images[:n])


def test_every_row_is_counted_and_few_are_asked_at_once() -> None:
    suspect, twin = Knows(DATA), Knows(DATA)
    _, spent = found_of(suspect, twin)
    assert spent == sum(suspect.rows) + sum(twin.rows) > 9 * (STARTS + OWN)
    assert max(suspect.rows + twin.rows) == ROWS


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="images with little noise are not finite"):
        found_of(Knows(DATA * float("nan")), Knows(DATA))


def test_the_same_seed_finds_the_same_pictures() -> None:
    suspect, twin = small_of("consistency"), Knows(DATA)
    assert torch.equal(found_of(suspect, twin)[0], found_of(suspect, twin)[0])
