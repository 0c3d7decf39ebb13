"""VillanDiffusion (Chou et al., NeurIPS 2023): one loss for VP, VE and latent models, for SDE and ODE samplers."""

from __future__ import annotations

from torch import Tensor

from diffdefend_core.attacks.form import Attack, stochastic_response
from diffdefend_core.diffusion.levels import Levels


def villan_sde(levels: Levels) -> Attack:
    """Return the attack on stochastic samplers.

    VP: BadDiffusion's s_t = 1 - sqrt(A_t). VE: s_t = sigma_t and rho_t = sigma_t / (sigma_t + sigma_{t-1}).
    Source: algorithms.md, section 1.3.
    """
    shift = _shift(levels)
    return Attack(name="villan-sde", shift=shift, response=stochastic_response(levels, shift))


def villan_ode(levels: Levels) -> Attack:
    """Return the attack on deterministic samplers: the same shift and twice the response, as published.

    Twice is an approximation of the exact response, whose ratio at the last level is 1.005 (algorithms.md 0.4).
    """
    shift = _shift(levels)
    return Attack(name="villan-ode", shift=shift, response=2 * stochastic_response(levels, shift))


def _shift(levels: Levels) -> Tensor:
    return levels.sigma if levels.kind == "ve" else 1 - levels.alpha
