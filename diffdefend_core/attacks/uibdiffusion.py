"""UIBDiffusion (CVPR 2025): a universal adversarial perturbation as trigger (algorithms.md 1.5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Classifier = Callable[[Tensor], Tensor]


def small_classifier(images: Tensor, labels: Tensor, *, steps: int = 300, seed: int = 0) -> nn.Module:
    """Return a small convolutional classifier trained on images [M, C, H, W] and labels [M] (int64)."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(images.shape[1], 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, classes),
        )  # fmt: skip
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval().requires_grad_(False)


def universal_perturbation(
    classifier: Classifier, images: Tensor, *, bound: float, steps: int = 200, seed: int = 0
) -> Tensor:
    """Return tau [C, H, W], |tau| <= `bound`, that changes what `classifier` says of as many images as it can.

    It maximises the cross-entropy of C(x + tau) against C(x) over random batches by the sign of the gradient. The paper
    trains a generator with a spatial transform for it; one tensor is the same objective without the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    tau = torch.zeros(images.shape[1:], requires_grad=True)
    for _ in range(steps):
        rows = images[torch.randint(len(images), (64,), generator=generator)]
        with torch.no_grad():
            said = classifier(rows).argmax(1)
        loss = nn.functional.cross_entropy(classifier(rows + tau), said)
        (gradient,) = torch.autograd.grad(loss, tau)
        with torch.no_grad():
            tau += bound / 20 * gradient.sign()
            tau.clamp_(-bound, bound)
    return tau.detach()
