"""Train the small feature extractor that the package ships: `python -m zoo.extractor` prints its sha256.

Weights of another digest must be entered in `features.SHIPPED`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import diffdefend_core.evaluation.features as features
from zoo.data import digits

REFERENCE = Path(__file__).parent / "digits" / "reference.npz"
TARGET = Path(features.__file__).parent / "weights" / "digits-cnn-v1.safetensors"


def write_reference() -> None:
    """Write the features of all digits: a reference set for the FID of models trained on them."""
    chosen = features.extractor("digits-cnn-v1")
    REFERENCE.parent.mkdir(exist_ok=True)
    np.savez(REFERENCE, features=chosen.apply(digits() / 2 + 0.5).float().numpy(), extractor=chosen.name)


def main() -> None:
    """Train on the digits with small shifts and noise; write the weights."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = digits() / 2 + 0.5, torch.from_numpy(load_digits().target)
    network = features.DigitsCnn()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(1500):
        rows = torch.randint(len(images), (64,))
        dx, dy = torch.randint(-1, 2, (2,)).tolist()
        x = torch.roll(images[rows], (dy, dx), (2, 3)) + 0.1 * torch.rand(1) * torch.randn(64, 1, 16, 16)
        loss = nn.functional.cross_entropy(network(x.clamp(0, 1)), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    accuracy = (network(images).argmax(1) == labels).float().mean().item()
    TARGET.parent.mkdir(exist_ok=True)
    save_file(network.state_dict(), TARGET)
    print(f"accuracy {accuracy:.3f}, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")
    write_reference()


if __name__ == "__main__":
    main()
