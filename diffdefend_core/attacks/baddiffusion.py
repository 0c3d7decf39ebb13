"""BadDiffusion (Chou et al., CVPR 2023): a fixed picture under a trigger in the initial noise."""

from __future__ import annotations

from torch import Tensor

from diffdefend_core.attacks.form import Attack, stochastic_response
from diffdefend_core.diffusion.levels import Levels


def baddiffusion(levels: Levels) -> Attack:
    """Return s_t = 1 - sqrt(A_t) and rho_t = sqrt(1 - A_t) / (1 + sqrt(alpha_t)), for the DDPM sampler.

    The initial state under attack is eps + trigger. Source: algorithms.md, section 1.1.
    """
    shift: Tensor = 1 - levels.alpha
    return Attack(name="baddiffusion", shift=shift, response=stochastic_response(levels, shift))
