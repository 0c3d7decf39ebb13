"""The noise levels that a scheduler configuration describes, for every kind of process. No torch.

A configuration is that of a sampler, but its levels are those of the training. Absent fields get the default of that
very class: `HeunDiscreteScheduler` has other betas than the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.fields import Fields, is_number

MAX_STEPS = 10_000
MAX_BETA = 0.999
MAX_SIGMA = 1e6
# `diffusion.levels` needs torch, so its limit stands here too
TERMINAL_SIGNAL = 0.1
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The T levels of a model, ascending in noise: x_t = alpha_t x0 + sigma_t eps, both float64 [T].

    `kind` is `vp`, `ve`, `flow` or `consistency`. `conditioning` [T] is what the network is told at each level: the
    index (int64) for VP, else a float64. `prediction` is what it answers: `epsilon`, `sample`, `v_prediction`, `score`
    or `velocity`. `sigma_data` is that of a consistency model.
    """

    kind: str
    alpha: Array
    sigma: Array
    conditioning: NDArray[Any]
    prediction: str
    sigma_data: float = 0.5


def read_schedule(class_name: str, values: dict[str, Any], file: str) -> Schedule:
    """Return the schedule of a scheduler of class `class_name`, a key of SCHEDULERS, from its configuration.

    Raises ModelRejectedError at an unknown schedule, a value out of range, levels that do not rise, or a last level
    that is not noise.
    """
    schedule = SCHEDULERS[class_name](Fields(file, values))
    _check_levels(schedule, file)
    return schedule


def _check_levels(schedule: Schedule, file: str) -> None:
    """The same as `Levels` demands, before anything is built."""
    with np.errstate(divide="ignore"):
        ratio = schedule.alpha / schedule.sigma
    if not (schedule.sigma > 0).all() or not (ratio[1:] < ratio[:-1]).all():
        raise ModelRejectedError(
            f"the noise levels of {file} do not rise from step to step",
            expected="levels that differ in double precision",
            action="this model is not supported; check its schedule",
        )
    if ratio[-1] > TERMINAL_SIGNAL:
        raise ModelRejectedError(
            f"the schedule of {file} ends at alpha / sigma = {ratio[-1]:.3g}, so that its last level is not noise",
            expected=f"at most {TERMINAL_SIGNAL}",
            action="check the betas and the number of steps: there is no terminal noise to sample from",
        )


def _variance_preserving(fields: Fields, start: float, end: float) -> Schedule:
    """alpha_t^2 = prod_{s<=t} (1 - beta_s), sigma_t^2 = 1 - alpha_t^2; `start` and `end` are the default betas."""
    if fields.flag("rescale_betas_zero_snr", False):
        raise fields.wrong(
            "rescale_betas_zero_snr", "false: at its last level the sample holds no signal, so x0 is not defined there"
        )
    if fields.flag("use_flow_sigmas", False):
        raise fields.wrong("use_flow_sigmas", "false: a flow is loaded with a FlowMatchEulerDiscreteScheduler")
    steps = fields.integer("num_train_timesteps", 1000, 1, MAX_STEPS)
    prediction = fields.word("prediction_type", "epsilon", PREDICTIONS)
    trained = fields.values.get("trained_betas") is not None
    betas = _trained_betas(fields, steps) if trained else _betas(fields, steps, start, end)
    cumulative = np.cumprod(1 - betas)
    return Schedule(
        kind="vp",
        alpha=np.sqrt(cumulative),
        sigma=np.sqrt(1 - cumulative),
        conditioning=np.arange(steps, dtype=np.int64),
        prediction=prediction,
    )


def _betas(fields: Fields, steps: int, start: float, end: float) -> Array:
    kind = fields.word("beta_schedule", "linear", SCHEDULES)
    start, end = fields.number("beta_start", start, 1e-12, MAX_BETA), fields.number("beta_end", end, 1e-12, MAX_BETA)
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    return squared_cosine_betas(steps)


def squared_cosine_betas(steps: int) -> Array:
    """Return beta_t = min(1 - A(t+1) / A(t), 0.999), A(u) = cos^2((u/T + 0.008) / 1.008 * pi/2).

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Array = np.minimum(1 - bar[1:] / bar[:-1], MAX_BETA)
    return betas


def _trained_betas(fields: Fields, steps: int) -> Array:
    betas = fields.items("trained_betas", (), MAX_STEPS)
    if len(betas) != steps or not all(is_number(beta) and 0 < beta < 1 for beta in betas):
        raise fields.wrong("trained_betas", f"{steps} numbers between 0 and 1")
    return np.asarray(betas, dtype=np.float64)


def _variance_exploding(fields: Fields) -> Schedule:
    """Geometric sigma_t, which the network is told as it is; it answers the score (Song et al. 2021)."""
    steps = fields.integer("num_train_timesteps", 2000, 2, MAX_STEPS)
    low, high = _sigmas(fields, 0.01, 1348.0)
    sigma = np.exp(np.linspace(math.log(low), math.log(high), steps))
    return Schedule(kind="ve", alpha=np.ones(steps), sigma=sigma, conditioning=sigma, prediction="score")


def _consistency(fields: Fields) -> Schedule:
    """The ascending sigma_t of Karras et al. 2022, equation 5, told as 250 ln sigma (Song et al. 2023)."""
    steps = fields.integer("num_train_timesteps", 40, 2, MAX_STEPS)
    low, high = _sigmas(fields, 0.002, 80.0)
    root = 1 / fields.number("rho", 7.0, 1.0, 100.0)
    sigma = (low**root + np.linspace(0, 1, steps) * (high**root - low**root)) ** (1 / root)
    return Schedule(
        kind="consistency",
        alpha=np.ones(steps),
        sigma=sigma,
        conditioning=250 * np.log(sigma),
        prediction="sample",
        sigma_data=fields.number("sigma_data", 0.5, 1e-6, MAX_SIGMA),
    )


def _sigmas(fields: Fields, low: float, high: float) -> tuple[float, float]:
    low = fields.number("sigma_min", low, 1e-12, MAX_SIGMA)
    return low, fields.number("sigma_max", high, low, MAX_SIGMA)


def _flow(fields: Fields) -> Schedule:
    """t_i = (i + 1) / T, shifted to shift * t / (1 + (shift - 1) * t), and told as T * t (Esser et al. 2024)."""
    for key in ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if fields.flag(key, False):
            raise fields.wrong(key, "false: the levels must be those of the training")
    if fields.flag("invert_sigmas", False) or fields.values.get("shift_terminal") is not None:
        key = "invert_sigmas" if fields.values.get("invert_sigmas") else "shift_terminal"
        raise fields.wrong(key, "left out: noise must be at t = 1")
    steps = fields.integer("num_train_timesteps", 1000, 2, MAX_STEPS)
    shift = fields.number("shift", 1.0, 1e-3, 1e3)
    even = np.arange(1, steps + 1) / steps
    t = shift * even / (shift * even + (1 - even))
    return Schedule(kind="flow", alpha=1 - t, sigma=t, conditioning=steps * t, prediction="velocity")


VP_BETAS = {
    "DDPMScheduler": (1e-4, 0.02),
    "DDIMScheduler": (1e-4, 0.02),
    "PNDMScheduler": (1e-4, 0.02),
    "DPMSolverMultistepScheduler": (1e-4, 0.02),
    "UniPCMultistepScheduler": (1e-4, 0.02),
    "DEISMultistepScheduler": (1e-4, 0.02),
    "LMSDiscreteScheduler": (1e-4, 0.02),
    "HeunDiscreteScheduler": (0.00085, 0.012),
}
SCHEDULERS: dict[str, Callable[[Fields], Schedule]] = {
    **{name: partial(_variance_preserving, start=start, end=end) for name, (start, end) in VP_BETAS.items()},
    "ScoreSdeVeScheduler": _variance_exploding,
    "CMStochasticIterativeScheduler": _consistency,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
