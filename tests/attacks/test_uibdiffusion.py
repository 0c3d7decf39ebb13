"""UIBDiffusion: one perturbation within a bound that changes what a classifier says of most digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffdefend_core.attacks.uibdiffusion import small_classifier, universal_perturbation
from zoo.data import digits_data

BOUND = 0.5


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits_data().images * 2 - 1


@pytest.fixture(scope="module")
def classifier(images: Tensor) -> nn.Module:
    return small_classifier(images[:1500], digits_data().labels[:1500], seed=0)


@pytest.fixture(scope="module")
def perturbation(classifier: nn.Module, images: Tensor) -> Tensor:
    return universal_perturbation(classifier, images[:1500], bound=BOUND, steps=100)


def changed(classifier: nn.Module, images: Tensor, tau: Tensor) -> float:
    said, heard = (classifier(rows).argmax(1) for rows in (images, images + tau))
    return (said != heard).float().mean().item()


def test_the_classifier_knows_digits_that_it_has_not_seen(classifier: nn.Module, images: Tensor) -> None:
    said = classifier(images[1500:]).argmax(1)
    assert (said == digits_data().labels[1500:]).float().mean() > 0.8
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())


def test_one_perturbation_changes_most_answers_and_noise_of_its_size_does_not(
    classifier: nn.Module, images: Tensor, perturbation: Tensor
) -> None:
    noise = BOUND * torch.randn(perturbation.shape, generator=torch.Generator().manual_seed(1)).sign()
    assert perturbation.shape == (1, 16, 16)
    assert changed(classifier, images[1500:], perturbation) > 0.5
    assert changed(classifier, images[1500:], noise) < 0.5 * changed(classifier, images[1500:], perturbation)


def test_the_perturbation_stays_within_its_bound(classifier: nn.Module, images: Tensor, perturbation: Tensor) -> None:
    assert perturbation.abs().max().item() == pytest.approx(BOUND)
    small = universal_perturbation(classifier, images, bound=0.02, steps=30)
    assert small.abs().max().item() == pytest.approx(0.02)
    assert changed(classifier, images[1500:], small) < 0.2
    assert not perturbation.requires_grad


def test_both_are_reproducible_by_the_seed_and_leave_the_global_one_alone(images: Tensor) -> None:
    labels = digits_data().labels
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (small_classifier(images, labels, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    taus = [universal_perturbation(network, images, bound=0.5, steps=3) for network in (first, again, other)]
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(taus[0], taus[1])
