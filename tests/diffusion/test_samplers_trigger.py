"""The path of a trigger under each sampler: the table of algorithms.md 0.4, by an oracle network."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import deterministic_response, stochastic_response
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, geometric_sigmas, linear_betas
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS, Sampler
from diffdefend_core.diffusion.samplers.score_sde import score_sde_ve

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

VP = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
VE = Levels.variance_exploding(geometric_sigmas(2000))
PREDICTOR = partial(score_sde_ve, snr=0.0)  # the size of a correction depends on the trigger: no linear propagation


class Oracle(Denoiser):
    """A perfect backdoored model of one pixel, for the target 0 and the trigger 1.

    It answers (x - s_t) / sigma_t + rho_t: what is off the path s_t is noise to it. It keeps the states that it was
    asked about.
    """

    def __init__(self, levels: Levels, shift: Tensor, response: Tensor) -> None:
        self.levels, self.shift, self.response, self.shape = levels, shift, response, (1, 1, 1)
        self.network = nn.Linear(1, 1)
        self.states: list[tuple[int, float]] = []

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.states.append((int(t), x.item()))
        return (x - self.shift[t]) / self.levels.sigma[t] + self.response[t]


def distance(levels: Levels, shift: Tensor, response: Tensor, run: Sampler, steps: int, *, relative: bool) -> float:
    """Return the largest |c_t - s_t|, or |c_t - s_t| / sigma_t, over all calls of the network.

    c_t is the coefficient of the trigger in x_t: the difference to a run without trigger on the same noise.
    """
    states = []
    for planted in (1.0, 0.0):
        streams, oracle = generators(0, 1), Oracle(levels, planted * shift, planted * response)
        x = levels.initial_scale * (standard_normal(streams, (1, 1, 1)).double() + planted)
        run(oracle, x, steps=steps, streams=streams)
        states.append(oracle.states)
    return max(
        abs(triggered - clean - shift[t].item()) / (levels.sigma[t].item() if relative else 1.0)
        for (t, triggered), (_, clean) in zip(*states, strict=True)
    )


def villan_psi_0(levels: Levels) -> Tensor:
    """Return Villan's rho_t [T] for the step sigma_t (algorithms.md 1.3), h_t = sigma_t - sqrt(alpha_t) sigma_{t-1}."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    kept = (levels.alpha / torch.cat([one, levels.alpha[:-1]])) ** 2
    h = levels.sigma - kept.sqrt() * torch.cat([zero, levels.sigma[:-1]])
    return (1 - kept.sqrt()) * levels.sigma + h * (kept - levels.alpha**2) / (1 - kept)


SOLVERS = [entry.name for entry in SAMPLERS.values() if "vp" in entry.processes and not entry.stochastic]
BAD = baddiffusion(VP)
PLANTED = {
    "baddiffusion": (BAD.shift, BAD.response),
    "villan ode": (BAD.shift, 2 * BAD.response),
    "invisible": (BAD.shift, deterministic_response(VP, BAD.shift)),
    "villan psi 0, sde": (VP.sigma, villan_psi_0(VP)),
    "villan psi 0, ode": (VP.sigma, 2 * villan_psi_0(VP)),
    "step sigma, exact sde": (VP.sigma, stochastic_response(VP, VP.sigma)),
    "step sigma, rho 1": (VP.sigma, torch.ones(1000, dtype=torch.float64)),
}

# algorithms.md, table of section 0.4. Its DDIM column holds for steps at 999 .. 0, both ends taken ("linspace"); from
# 999 down to 19 ("trailing") it moves by at most .004. From 980 ("leading") its first number would be 1.98.
TABLE = {
    "baddiffusion": (0.006, 2.08),
    "villan ode": (0.951, 0.021),
    "invisible": (0.944, 0.012),
    "villan psi 0, sde": (0.129, 2.13),
    "villan psi 0, ode": (0.947, 0.232),
    "step sigma, exact sde": (0.000, 2.105),
    "step sigma, rho 1": (0.950, 0.000),
}


@pytest.mark.parametrize("attack", PLANTED)
def test_a_trigger_stays_on_its_path_only_under_the_sampler_it_was_planted_for(attack: str) -> None:
    shift, response = PLANTED[attack]
    stochastic, deterministic = TABLE[attack]
    found = distance(VP, shift, response, SAMPLERS["DDPM-SCHED"].run, 1000, relative=False)
    assert found == pytest.approx(stochastic, abs=6e-4)
    found = distance(VP, shift, response, SAMPLERS["DDIM-SCHED"].run, 50, relative=False)
    assert found == pytest.approx(deterministic, abs=4e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_deterministic_solver_keeps_the_deterministic_trigger_and_loses_the_stochastic_one(name: str) -> None:
    run, steps = SAMPLERS[name].run, SAMPLERS[name].steps
    assert distance(VP, *PLANTED["invisible"], run, steps, relative=False) < 0.1
    assert distance(VP, *PLANTED["baddiffusion"], run, steps, relative=False) > 1.5


# the same table: all 2000 levels, distances relative to sigma_t; its ODE is solved by Euler, which is DDIM with alpha 1
@pytest.mark.parametrize(
    ("factor", "sampler", "expected"),
    [
        (1, PREDICTOR, 0.000),
        (1, SAMPLERS["DDIM-SCHED"].run, 5.27),
        (1, SAMPLERS["EDM-VE-ODE"].run, 5.26),
        (2, PREDICTOR, 1.005),
        (2, SAMPLERS["DDIM-SCHED"].run, 0.028),
        (2, SAMPLERS["EDM-VE-ODE"].run, 0.030),
    ],
    ids=["sde by sde", "sde by euler", "sde by heun", "ode by sde", "ode by euler", "ode by heun"],
)
def test_a_trigger_of_villan_in_an_exploding_model_does_so_too(factor: int, sampler: Sampler, expected: float) -> None:
    response = factor * stochastic_response(VE, VE.sigma)
    assert distance(VE, VE.sigma, response, sampler, 2000, relative=True) == pytest.approx(expected, abs=4e-3)


def test_the_response_of_villan_in_an_exploding_model_is_a_half() -> None:
    before = torch.cat([torch.zeros(1, dtype=torch.float64), VE.sigma[:-1]])
    torch.testing.assert_close(stochastic_response(VE, VE.sigma), VE.sigma / (VE.sigma + before))
    assert stochastic_response(VE, VE.sigma)[-1].item() == pytest.approx(0.5013, abs=1e-4)
    torch.testing.assert_close(deterministic_response(VE, VE.sigma), torch.ones(2000, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1, 2])
def test_fresh_noise_on_the_way_carries_no_trigger_so_that_edm_with_churn_loses_both(factor: int) -> None:
    response = factor * stochastic_response(VE, VE.sigma)
    assert distance(VE, VE.sigma, response, SAMPLERS["EDM-VE-SDE"].run, 50, relative=True) > 0.9
