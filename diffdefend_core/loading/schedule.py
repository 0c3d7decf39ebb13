"""The noise schedule that a scheduler configuration describes. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.loading.fields import Fields, is_number

MAX_STEPS = 10_000
MAX_BETA = 0.999
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Schedule:
    """The levels of a VP model: betas [T] in (0, 1), float64, and what the network predicts."""

    betas: NDArray[np.float64]
    prediction: str


def read_schedule(values: dict[str, Any], file: str) -> Schedule:
    """Return the schedule of a DDPMScheduler or DDIMScheduler; absent fields get their defaults.

    Raises ModelRejectedError at an unknown schedule, a value out of range, or a last level without signal.
    """
    fields = Fields(file, values)
    if fields.flag("rescale_betas_zero_snr", False):
        raise fields.wrong(
            "rescale_betas_zero_snr", "false: at its last level the sample holds no signal, so x0 is not defined there"
        )
    steps = fields.integer("num_train_timesteps", 1000, 1, MAX_STEPS)
    prediction = fields.word("prediction_type", "epsilon", PREDICTIONS)
    if values.get("trained_betas") is not None:
        return Schedule(_trained_betas(fields, steps), prediction)
    return Schedule(_betas(fields, steps), prediction)


def _betas(fields: Fields, steps: int) -> NDArray[np.float64]:
    kind = fields.word("beta_schedule", "linear", SCHEDULES)
    start, end = fields.number("beta_start", 1e-4, 1e-12, MAX_BETA), fields.number("beta_end", 0.02, 1e-12, MAX_BETA)
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    return squared_cosine_betas(steps)


def squared_cosine_betas(steps: int) -> NDArray[np.float64]:
    """Return beta_t = min(1 - A(t+1) / A(t), 0.999), A(u) = cos^2((u/T + 0.008) / 1.008 * pi/2).

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: NDArray[np.float64] = np.minimum(1 - bar[1:] / bar[:-1], MAX_BETA)
    return betas


def _trained_betas(fields: Fields, steps: int) -> NDArray[np.float64]:
    betas = fields.items("trained_betas", (), MAX_STEPS)
    if len(betas) != steps or not all(is_number(beta) and 0 < beta < 1 for beta in betas):
        raise fields.wrong("trained_betas", f"{steps} numbers between 0 and 1")
    return np.asarray(betas, dtype=np.float64)
