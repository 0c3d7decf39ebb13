"""Our schedules against those that diffusers computes itself."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from diffdefend_core.diffusion import levels
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.schedule import SCHEDULERS, TERMINAL_SIGNAL, VP_BETAS, Schedule, read_schedule


def theirs_and_ours(class_name: str, options: dict[str, object], folder: Path) -> tuple[Any, Schedule]:
    """Return the scheduler of diffusers and our schedule of the file that it saves."""
    scheduler = getattr(diffusers, class_name)(**options)
    scheduler.save_config(folder)
    return scheduler, read_schedule(class_name, json.loads((folder / "scheduler_config.json").read_text()), "x")


@pytest.mark.parametrize("class_name", VP_BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.4},
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"num_train_timesteps": 3, "trained_betas": [0.5, 0.9, 0.99]},
    ],
)
def test_variance_preserving_levels_are_those_of_diffusers(
    class_name: str, options: dict[str, object], tmp_path: Path
) -> None:
    theirs, ours = theirs_and_ours(class_name, options, tmp_path)
    np.testing.assert_allclose(ours.alpha**2, theirs.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-9)
    np.testing.assert_allclose(ours.alpha**2 + ours.sigma**2, 1, rtol=1e-12)
    assert (ours.kind, ours.prediction) == ("vp", options.get("prediction_type", "epsilon"))
    assert ours.conditioning.tolist() == list(range(theirs.config.num_train_timesteps))
    absent = read_schedule(class_name, options, "x")
    np.testing.assert_array_equal(ours.alpha, absent.alpha)


def test_absent_fields_get_the_default_of_that_class_and_not_of_another() -> None:
    last = {name: read_schedule(name, {}, "x").alpha[-1] for name in VP_BETAS}
    assert last["HeunDiscreteScheduler"] == pytest.approx(0.0397, rel=0.01)
    assert {value for name, value in last.items() if name != "HeunDiscreteScheduler"} == {last["DDPMScheduler"]}
    assert last["DDPMScheduler"] == pytest.approx(0.00635, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"num_train_timesteps": 20, "sigma_min": 0.02, "sigma_max": 30.0}])
def test_variance_exploding_levels_are_those_of_diffusers(options: dict[str, object], tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("ScoreSdeVeScheduler", options, tmp_path)
    np.testing.assert_allclose(ours.sigma, theirs.discrete_sigmas.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(ours.conditioning, ours.sigma)
    assert (ours.kind, ours.prediction, set(ours.alpha)) == ("ve", "score", {1.0})


@pytest.mark.parametrize("options", [{}, {"num_train_timesteps": 7, "shift": 3.0}, {"shift": 0.5}])
def test_flow_levels_are_those_of_diffusers(options: dict[str, object], tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("FlowMatchEulerDiscreteScheduler", options, tmp_path)
    np.testing.assert_allclose(ours.sigma, theirs.sigmas.flip(0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.conditioning, theirs.timesteps.flip(0).numpy(), rtol=1e-5)
    assert ours.alpha[-1] == 0 and ours.sigma[-1] == 1
    assert (ours.kind, ours.prediction) == ("flow", "velocity")


@pytest.mark.parametrize("options", [{}, {"num_train_timesteps": 9, "sigma_max": 50.0, "rho": 5.0, "sigma_data": 0.7}])
def test_consistency_levels_are_those_of_diffusers(options: dict[str, object], tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("CMStochasticIterativeScheduler", options, tmp_path)
    np.testing.assert_allclose(ours.sigma, theirs.sigmas.flip(0).numpy(), rtol=1e-9)
    np.testing.assert_allclose(ours.conditioning, theirs.timesteps.flip(0).numpy(), rtol=1e-9)
    assert (ours.kind, ours.sigma_data) == ("consistency", options.get("sigma_data", 0.5))


VP = "DDPMScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("class_name", "options", "words"),
    [
        (VP, {"beta_schedule": "sigmoid"}, "one of linear, scaled_linear, squaredcos_cap_v2"),
        (VP, {"rescale_betas_zero_snr": True}, "holds no signal"),
        (VP, {"prediction_type": "flow"}, "one of epsilon, sample, v_prediction"),
        (VP, {"num_train_timesteps": 0}, "whole number from 1"),
        (VP, {"num_train_timesteps": 10**9}, "whole number from 1"),
        (VP, {"num_train_timesteps": 50.0}, "whole number from 1"),
        (VP, {"beta_start": 0.0}, "beta_start"),
        (VP, {"beta_end": 1.0}, "beta_end"),
        (VP, {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, "3 numbers between 0 and 1"),
        (VP, {"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}, "2 numbers between 0 and 1"),
        (VP, {"beta_start": 0.9, "beta_end": 0.9}, "do not rise"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("ScoreSdeVeScheduler", {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max"),
        ("ScoreSdeVeScheduler", {"sigma_min": 20.0, "sigma_max": 20.0}, "do not rise"),
        ("CMStochasticIterativeScheduler", {"rho": 0}, "rho"),
        (FLOW, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (FLOW, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (FLOW, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (FLOW, {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (FLOW, {"invert_sigmas": True}, "invert_sigmas"),
        (FLOW, {"shift_terminal": 0.1}, "shift_terminal"),
        (FLOW, {"shift": 0.0}, "shift"),
    ],
)
def test_other_schedules_are_refused(class_name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ModelRejectedError, match=words) as caught:
        read_schedule(class_name, options, "scheduler_config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        (VP, {"num_train_timesteps": 50}),
        (VP, {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]}),
        ("ScoreSdeVeScheduler", {"sigma_max": 5.0}),
        ("CMStochasticIterativeScheduler", {"sigma_max": 5.0}),
    ],
)
def test_a_schedule_without_terminal_noise_is_refused(class_name: str, options: dict[str, object]) -> None:
    with pytest.raises(ModelRejectedError, match=r"ends at alpha / sigma = .* its last level is not noise") as caught:
        read_schedule(class_name, options, "scheduler_config.json")
    assert "\n" not in str(caught.value)


def test_the_limit_of_terminal_noise_is_that_of_the_levels() -> None:
    assert TERMINAL_SIGNAL == levels.TERMINAL_SIGNAL


def test_every_class_exists_in_diffusers() -> None:
    assert all(hasattr(diffusers, name) for name in SCHEDULERS)
