"""Precision and recall by hand, and against scikit-learn's nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import diffdefend_core.evaluation.neighbours as neighbours
from diffdefend_core.evaluation.neighbours import covered, radii


def rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + shift


def test_radii_and_cover_by_hand() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # third nearest others: 10, 9, 8, 10
    assert radii(reference).tolist() == [10.0, 9.0, 8.0, 10.0]
    assert radii(reference, k=1).tolist() == [1.0, 1.0, 1.0, 8.0]
    probes = torch.tensor([[-1.5], [-1.0], [3.0], [18.0], [18.5]])
    assert covered(probes, reference, radii(reference, k=1)).tolist() == [0, 1, 1, 1, 0]


def test_they_are_those_of_scikit_learn() -> None:
    generated, reference = rows(40, 0, shift=0.8), rows(50, 1)
    found = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(reference.double().numpy())
    width = found.kneighbors()[0][:, 2]
    np.testing.assert_allclose(radii(reference).numpy(), width, rtol=1e-12)
    distances = np.linalg.norm(generated.double().numpy()[:, None] - reference.double().numpy()[None], axis=-1)
    inside = (distances <= width).any(1)
    assert 0 < inside.sum() < 40
    assert covered(generated, reference, radii(reference)).tolist() == inside.astype(float).tolist()


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    one, other = rows(30, 0), rows(30, 1, shift=50.0)
    assert covered(one, one, radii(one)).mean() == 1
    assert covered(other, one, radii(one)).mean() == 0


def test_few_modes_are_precise_and_recall_little() -> None:
    reference = torch.cat([rows(60, seed, shift=20.0 * seed) for seed in range(3)])
    generated = rows(90, 7)
    assert covered(generated, reference, radii(reference)).mean() > 0.8
    assert covered(reference, generated, radii(generated)).mean() < 0.45


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rows(25, 0), rows(31, 1, shift=0.7)
    whole = radii(first), covered(second, first, radii(first))
    monkeypatch.setattr(neighbours, "BLOCK", 4)
    for found, expected in zip((radii(first), covered(second, first, radii(first))), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_too_few_rows_and_rows_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="3 feature rows; precision and recall need at least 4"):
        radii(rows(3, 0))
    with pytest.raises(ValueError, match="not finite"):
        radii(rows(9, 0) / 0)
