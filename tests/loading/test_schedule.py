"""Our schedules against those that diffusers computes itself."""

import numpy as np
import pytest
from diffusers import DDPMScheduler

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.schedule import read_schedule


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.2},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_betas_are_those_of_diffusers(options: dict[str, object]) -> None:
    theirs = DDPMScheduler(**options)
    ours = read_schedule(dict(theirs.config), "scheduler_config.json")
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(np.cumprod(1 - ours.betas), theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-9)
    assert ours.prediction == "epsilon"
    np.testing.assert_array_equal(ours.betas, read_schedule(options, "x").betas)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "one of linear, scaled_linear, squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, "holds no signal"),
        ({"prediction_type": "flow"}, "one of epsilon, sample, v_prediction"),
        ({"num_train_timesteps": 0}, "whole number from 1"),
        ({"num_train_timesteps": 10**9}, "whole number from 1"),
        ({"num_train_timesteps": 50.0}, "whole number from 1"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, "3 numbers between 0 and 1"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}, "2 numbers between 0 and 1"),
    ],
)
def test_other_schedules_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ModelRejectedError, match=words):
        read_schedule(options, "scheduler_config.json")
