"""The searches of a consistency model: towards a picture that is known, from other starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analytic import small_of
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdefend_core.inversion import own_samples
from diffdefend_core.inversion import picture as picture_module
from diffdefend_core.inversion.picture import AGAIN, led_again
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent

ZOO = Path(__file__).parents[2] / "zoo" / "digits"


def test_what_searches_of_one_picture_share_is_nearer_to_the_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "consistency-noise"
    suspect, planted = load_denoiser(ZOO / name), load_file(ZOO / "backdoors" / f"{name}.safetensors")
    each: list[Tensor] = []
    alike = picture_module._Search.alike

    def watched(*given: object) -> object:
        each.append((track := alike(*given)).shift.detach())  # type: ignore[arg-type]
        return track

    monkeypatch.setattr(picture_module._Search, "alike", watched)
    samples = own_samples(suspect, 64, 4, 0, silent)
    found = led_again(suspect, samples, planted["target"], InversionOptions(), seed=0)
    (mean,) = found.shifts
    nearest = sorted(cosine(tau, planted["trigger"]) for tau in each)
    assert len(nearest) == AGAIN and nearest[0] > 0.5
    assert cosine(mean, planted["trigger"]) > sum(nearest) / AGAIN + 0.03
    assert mean.square().mean().sqrt() == pytest.approx(planted["trigger"].square().mean().sqrt(), rel=0.25)


class Counting(nn.Module):
    """Counts the rows that go through a network: 1 forward, 3 forward and backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = self.inner(x, t)
        self.seen += len(x) * (3 if answer.requires_grad else 1)
        return answer


def test_its_evaluations_are_those_that_were_made() -> None:
    suspect = small_of("consistency")
    suspect.network = Counting(suspect.network)
    options = InversionOptions(race_iterations=3, pairs=2, probe_pairs=4)
    found = led_again(suspect, torch.zeros(4, *suspect.shape), torch.full(suspect.shape, 0.5), options, seed=0)
    assert found.forward_equivalents == suspect.network.seen > 0
