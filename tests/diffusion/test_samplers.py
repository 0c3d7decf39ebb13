"""The samplers against diffusers, and against the path that an attack trains its network for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import clean_denoiser, small_denoiser, vp_levels
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS, ddim, ddpm, trailing_steps

SHAPE = (2, 6, 6)


def scheduler(kind: type[DDPMScheduler] | type[DDIMScheduler], total: int, prediction: str) -> DDPMScheduler:
    return kind(
        num_train_timesteps=total,
        beta_start=0.1 / total,
        beta_end=20 / total,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )


@torch.no_grad()
def sampled_by_diffusers(denoiser: DDPM, reference: DDPMScheduler, steps: int, rows: int) -> Tensor:
    streams = generators(7, rows)
    x = standard_normal(streams, SHAPE)
    reference.set_timesteps(steps)
    for t in reference.timesteps:
        x = reference.step(denoiser.network(x, t.expand(rows)), t, x, generator=streams).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("total", "steps"), [(100, 100), (1000, 50)])
@pytest.mark.parametrize(("name", "kind"), [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_the_samplers_agree_with_diffusers(name: str, kind: type, total: int, steps: int, prediction: str) -> None:
    denoiser = small_denoiser(vp_levels(total), shape=SHAPE, prediction=prediction)
    expected = sampled_by_diffusers(denoiser, scheduler(kind, total, prediction), steps, rows=3)
    streams = generators(7, 3)
    found = SAMPLERS[name](denoiser, standard_normal(streams, SHAPE), steps=steps, streams=streams)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


def test_the_samplers_do_not_agree_with_each_other() -> None:
    denoiser = small_denoiser(vp_levels(100), shape=SHAPE)
    ancestral, implicit = (
        sampler(denoiser, standard_normal(streams, SHAPE), steps=50, streams=streams)
        for sampler, streams in ((ddpm, generators(7, 3)), (ddim, generators(7, 3)))
    )
    assert (ancestral - implicit).abs().max() > 0.01 * ancestral.abs().max()


@pytest.mark.parametrize("steps", [1, 7, 20, 33, 50, 250])
def test_trailing_steps_are_those_of_diffusers(steps: int) -> None:
    reference = scheduler(DDPMScheduler, 250, "epsilon")
    reference.set_timesteps(steps)
    found = trailing_steps(250, steps)
    assert found == reference.timesteps.tolist()
    assert found[0] == 249 and len(found) == steps and (np.diff(found) < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 251])
def test_steps_that_do_not_fit_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} sampling steps do not fit a model of 250 levels"):
        trailing_steps(250, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_model_paints_the_distribution_of_its_data(name: str) -> None:
    denoiser = clean_denoiser(vp_levels(), variance=0.25, mean=0.3)
    streams = generators(3, 200)
    images = SAMPLERS[name](denoiser, standard_normal(streams, denoiser.shape), steps=250, streams=streams)
    assert images.mean().item() == pytest.approx(0.3, abs=0.02)
    assert images.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_reported(name: str) -> None:
    seen: list[tuple[int, int]] = []
    streams = generators(0, 1)
    SAMPLERS[name](
        small_denoiser(vp_levels(50), shape=SHAPE),
        standard_normal(streams, SHAPE),
        steps=4,
        streams=streams,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Oracle(nn.Module):
    """A perfect network for the target 0 and a trigger of one pixel: what is off the path s_t is noise to it.

    It answers (x - s_t) / sigma_t + rho_t, and keeps the states that it was asked about.
    """

    def __init__(self, levels: Levels, shift: Tensor, response: Tensor) -> None:
        super().__init__()
        self.levels, self.shift, self.response = levels, shift, response
        self.states: dict[int, float] = {}
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.states[int(t)] = x.item()
        return (x - self.shift[t]) / self.levels.sigma[t] + self.response[t]


def distance_from_path(levels: Levels, shift: Tensor, response: Tensor, name: str, steps: int) -> float:
    """Return the largest |c_t - s_t|: c_t is the coefficient of the trigger in the state of our sampler.

    A run without trigger, on the same noise, is subtracted: what is left is the trigger's share.
    """
    states = []
    for planted in (1.0, 0.0):
        streams, oracle = generators(0, 1), Oracle(levels, planted * shift, planted * response)
        denoiser: Denoiser = DDPM(oracle, levels, shape=(1, 1, 1))
        state = standard_normal(streams, (1, 1, 1)).double() + planted
        SAMPLERS[name](denoiser, state, steps=steps, streams=streams)
        states.append(oracle.states)
    return max(abs(states[0][t] - states[1][t] - shift[t].item()) for t in states[0])


def implicit_response(levels: Levels, shift: Tensor) -> Tensor:
    """Return the rho_t of the deterministic sampler (algorithms.md 0.4), which InviBackdoor plants."""
    start = torch.zeros(1, dtype=torch.float64)
    slope = torch.cat([start, shift / levels.alpha]).diff()
    return slope / torch.cat([start, levels.sigma / levels.alpha]).diff()


# algorithms.md, table of section 0.4
@pytest.mark.parametrize(
    ("planted", "stochastic", "deterministic"),
    [("baddiffusion", 0.006, 2.08), ("villan ode", 0.951, 0.021), ("invisible", 0.944, 0.012)],
)
def test_a_trigger_stays_on_its_path_only_under_the_sampler_it_was_trained_for(
    planted: str, stochastic: float, deterministic: float
) -> None:
    levels = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
    attack = baddiffusion(levels)
    response = {
        "baddiffusion": attack.response,
        "villan ode": 2 * attack.response,
        "invisible": implicit_response(levels, attack.shift),
    }[planted]
    assert distance_from_path(levels, attack.shift, response, "ddpm", 1000) == pytest.approx(stochastic, abs=6e-4)
    assert distance_from_path(levels, attack.shift, response, "ddim", 50) == pytest.approx(deterministic, abs=6e-3)
