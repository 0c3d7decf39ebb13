"""TrojFlow (arXiv 2412.16512): TrojDiff's biased noise in a rectified flow, fired by the ordinary Euler sampler.

Only the abstract was readable: the form is inferred (algorithms.md 1.7), with TrojDiff's blend and patch triggers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdefend_core.attacks.form import Attack
from diffdefend_core.diffusion.levels import Levels


def trojflow(levels: Levels, gamma: float | Tensor) -> Attack:
    """Return s_t = t, rho = 1 and a scaled target: the flow runs straight from gamma * eps + mu to the target.

    x_t = (1 - t) y + t (gamma eps + mu) and the velocity is (gamma eps + mu) - y. `gamma` as in TrojDiff.
    """
    return Attack(
        name="trojflow", shift=levels.sigma, response=torch.ones_like(levels.sigma), gamma=gamma, scaled_target=True
    )
