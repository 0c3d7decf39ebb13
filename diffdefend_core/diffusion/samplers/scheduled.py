"""The multistep solvers of diffusers over any VP levels (algorithms.md, section 3).

A scheduler of diffusers counts in level numbers, and that is exact only for some pairs of levels and steps: with 1000
levels and 61 steps it asks for a 62nd step at level -1, and PNDM moves by `levels // steps` although its steps lie
`levels / steps` apart. So each is built over the levels that it visits (`visited_levels`), where its arithmetic is
exact. Where the plain scheduler is right, the result is the same. Every setting that changes a sample is explicit:
defaults differ between schedulers, those of Heun are not even the noise schedule of DDPM.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.random import Generators
from diffdefend_core.diffusion.samplers.base import Progress, trailing_steps
from diffdefend_core.errors import InputError

PNDM_LEAST_STEPS = 4
OWN_SIGMAS: dict[str, object] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
MULTISTEP: dict[str, object] = {
    **OWN_SIGMAS,
    "use_flow_sigmas": False,
    "thresholding": False,
    "lower_order_final": True,
}


def dpm_solver(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None, order: int
) -> Tensor:
    """Return samples [N, C, H, W] by the multistep DPM-Solver of `order` 1, 2 or 3 (Lu et al. 2022a, section 3).

    With lambda = log(alpha / sigma) it integrates the noise exactly but for a Taylor series of `order` terms:
    x_s = alpha_s / alpha_t * x_t - alpha_s * integral of exp(-lambda) * noise. The end is the first level, not the
    clean data: there lambda is infinite.
    """
    ends_at_first_level = trailing_steps(len(denoiser.levels), steps)[-1] == 0
    settings = {
        **MULTISTEP,
        "solver_order": order,
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
        # the last step then goes nowhere, and a higher order would divide zero by zero
        "euler_at_final": ends_at_first_level,
    }
    return _dpm(denoiser, x, settings, steps=steps, progress=progress)


def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None, order: int
) -> Tensor:
    """Return samples [N, C, H, W] by the multistep DPM-Solver++ of `order` 1, 2 or 3 (Lu et al. 2022b, section 4).

    As `dpm_solver`, for the predicted x0 in place of the noise: x_s = sigma_s / sigma_t * x_t + sigma_s * integral of
    exp(lambda) * x0. The last step is of first order and ends at the clean data.
    """
    settings = {
        **MULTISTEP,
        "solver_order": order,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "euler_at_final": True,
    }
    return _dpm(denoiser, x, settings, steps=steps, progress=progress)


def unipc(
    denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] by UniPC of order 2 with B_2(h) = exp(h) - 1 (Zhao et al. 2023, algorithm 1).

    The predictor is DPM-Solver++ of the same order; each answer also corrects the step that led to it.
    """
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    settings = {
        **MULTISTEP,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
    }
    return _solve(denoiser, x, UniPCMultistepScheduler, settings, steps=steps, progress=progress)


def pndm(denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None) -> Tensor:
    """Return samples [N, C, H, W] by F-PNDM (Liu et al. 2022, algorithm 2): 9 more network calls than steps.

    Three pseudo Runge-Kutta steps of four calls each, then the linear multistep rule
    noise' = (55 e_t - 59 e_{t+1} + 37 e_{t+2} - 9 e_{t+3}) / 24 in a DDIM step. On a cosine schedule it diverges below
    some hundred steps, even with a perfect network. Raises InputError for fewer than 4 steps: diffusers would return
    noise.
    """
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    if steps < PNDM_LEAST_STEPS:
        raise InputError(
            f"sampler PNDM with {steps} steps",
            expected=f"at least {PNDM_LEAST_STEPS}",
            action="ask for more steps or choose another sampler",
        )
    settings: dict[str, object] = {"skip_prk_steps": False, "set_alpha_to_one": True}
    return _solve(denoiser, x, PNDMScheduler, settings, steps=steps, progress=progress)


def deis(denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None) -> Tensor:
    """Return samples [N, C, H, W] by DEIS of order 2 in log-rho (Zhang & Chen 2023, section 3.3).

    An exponential integrator: the noise is extrapolated by a polynomial in log(sigma / alpha) through the last
    answers. The end is the first level, not the clean data.
    """
    from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler

    settings = {**MULTISTEP, "solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"}
    return _solve(denoiser, x, DEISMultistepScheduler, settings, steps=steps, progress=progress)


def heun(denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None) -> Tensor:
    """Return samples [N, C, H, W] by Heun's method (Karras et al. 2022, algorithm 1): 2 steps - 1 network calls.

    In y = x / alpha with s = sigma / alpha the ODE is dy / ds = noise; each step but the last averages the slopes at
    both of its ends. On a cosine schedule, whose last s is 20 000, it needs a hundred steps or more.
    """
    from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

    settings = {**OWN_SIGMAS, "clip_sample": False}
    return _solve(denoiser, x, HeunDiscreteScheduler, settings, steps=steps, progress=progress)


def lmsd(denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None) -> Tensor:
    """Return samples [N, C, H, W] by the linear multistep method of order 4 (Crowson 2022, k-diffusion).

    The ODE of `heun`; the slope is the polynomial in s through the last four answers (Adams-Bashforth).
    """
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    return _solve(denoiser, x, LMSDiscreteScheduler, OWN_SIGMAS, steps=steps, progress=progress)


def visited_levels(total: int, steps: int) -> list[int]:
    """Return the ascending indices [2 * steps] of the levels that a solver visits.

    At odd places are the `trailing_steps`, and before each the middle between it and the step below it (PNDM asks
    there); the first is level 0, where DPM-Solver and DEIS end.
    """
    ends = trailing_steps(total, steps)[::-1]
    middles = [0, *((low + high) // 2 for low, high in pairwise(ends))]
    return [level for pair in zip(middles, ends, strict=True) for level in pair]


def visited_level(visited: list[int], t: float) -> int:
    """Return the level index at place t of `visited_levels`. Raises RuntimeError where t is no place."""
    place = round(t)
    if abs(place - t) > 1e-3 or not 0 <= place < len(visited):
        raise RuntimeError(f"the scheduler asks for timestep {t}, expected a whole one from 0 to {len(visited) - 1}")
    return visited[place]


def build_scheduler(kind: Any, levels: Levels, visited: list[int], settings: dict[str, object]) -> Any:
    """Return a scheduler of class `kind` over the visited levels, for networks that answer noise.

    A_t is also set in float64: from betas in float32 the last levels of a cosine schedule are wrong by per cents.
    """
    cumulative = levels.alpha[visited] ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # "dpmsolver" is discouraged in favour of "++"
        scheduler = kind(
            num_train_timesteps=len(visited),
            trained_betas=(1 - cumulative / before).tolist(),
            prediction_type="epsilon",
            timestep_spacing="trailing",
            steps_offset=0,
            **settings,
        )
    scheduler.alphas_cumprod = cumulative
    return scheduler


def _dpm(
    denoiser: Denoiser, x: Tensor, settings: dict[str, object], *, steps: int, progress: Progress | None
) -> Tensor:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    settings = {
        **settings,
        "solver_type": "midpoint",
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
        "rescale_betas_zero_snr": False,
    }
    return _solve(denoiser, x, DPMSolverMultistepScheduler, settings, steps=steps, progress=progress)


@torch.no_grad()
def _solve(
    denoiser: Denoiser, x: Tensor, kind: Any, settings: dict[str, object], *, steps: int, progress: Progress | None
) -> Tensor:
    """Run the loop of diffusers; `progress` counts network calls."""
    visited = visited_levels(len(denoiser.levels), steps)
    scheduler = build_scheduler(kind, denoiser.levels, visited, settings)
    scheduler.set_timesteps(steps)
    x = x * float(scheduler.init_noise_sigma)
    for number, t in enumerate(scheduler.timesteps):
        level = torch.full((len(x),), visited_level(visited, t.item()), device=x.device)
        noise = denoiser.noise(scheduler.scale_model_input(x, t), level)
        x = scheduler.step(noise, t, x).prev_sample
        if progress is not None:
            progress(number + 1, len(scheduler.timesteps))
    return x
