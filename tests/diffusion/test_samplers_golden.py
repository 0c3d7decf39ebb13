"""The samplers against diffusers' own schedulers, built and run the way their users do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from analytic import FAMILIES, SmallNetwork, perfect_of, small_of
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, geometric_sigmas, linear_betas
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS, trailing_steps
from diffdefend_core.diffusion.samplers.scheduled import build_scheduler, visited_levels
from diffdefend_core.diffusion.samplers.score_sde import langevin

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")

SHAPE = (2, 6, 6)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@dataclass(frozen=True)
class Reference:
    """A scheduler of diffusers and what its user has to say beside the betas, the spacing and the prediction."""

    kind: type[Any]
    settings: dict[str, Any] = field(default_factory=dict)


def dpm(order: int, algorithm: str, final: str) -> Reference:
    settings = {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": final}
    return Reference(DPMSolverMultistepScheduler, settings)


REFERENCES = {
    "DDPM-SCHED": Reference(DDPMScheduler, {"clip_sample": False}),
    "DDIM-SCHED": Reference(DDIMScheduler, {"clip_sample": False}),
    **{f"DPM_SOLVER_O{order}": dpm(order, "dpmsolver", "sigma_min") for order in (1, 2, 3)},
    **{f"DPM_SOLVER_PP_O{order}": dpm(order, "dpmsolver++", "zero") for order in (1, 2, 3)},
    "UNIPC": Reference(UniPCMultistepScheduler),
    "PNDM": Reference(PNDMScheduler, {"set_alpha_to_one": True}),
    "DEIS": Reference(DEISMultistepScheduler),
    "HEUN": Reference(HeunDiscreteScheduler),
    "LMSD": Reference(LMSDiscreteScheduler),
}


def scheduler(name: str, total: int, betas: dict[str, Any], prediction: str) -> Any:
    reference = REFERENCES[name]
    return reference.kind(
        num_train_timesteps=total,
        prediction_type=prediction,
        timestep_spacing="trailing",
        **betas,
        **reference.settings,
    )


@torch.no_grad()
def sampled_by_diffusers(
    reference: Any,
    answer: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    rows: int,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    streams = generators(7, rows)
    reference.set_timesteps(steps)
    x = standard_normal(streams, shape).to(dtype) * reference.init_noise_sigma
    draws = {"generator": streams} if isinstance(reference, DDPMScheduler) else {}
    for t in reference.timesteps:
        output = answer(reference.scale_model_input(x, t), t.long().expand(rows))
        x = reference.step(output, t, x, **draws).prev_sample
    return x


def sampled_here(name: str, denoiser: Denoiser, steps: int, rows: int, seed: int = 7) -> Tensor:
    streams = generators(seed, rows)
    dtype = next(denoiser.network.parameters()).dtype
    x = denoiser.levels.initial_scale * standard_normal(streams, denoiser.shape).to(dtype)
    return SAMPLERS[name].run(denoiser, x, steps=steps, streams=streams)


def assert_agree(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", SCHEDULES)
@pytest.mark.parametrize("name", REFERENCES)
def test_a_sampler_agrees_with_diffusers(name: str, betas: str, prediction: str) -> None:
    # PNDM of diffusers mixes the velocities of several levels; the paper, and we, mix their noise
    reference = scheduler(name, 1000, SCHEDULES[betas], "epsilon" if name == "PNDM" else prediction)
    # alpha_T is 5e-5 for one of them: float32 keeps few digits of the noise there, and which depends on the processor.
    # DDPM draws other noise in float64.
    dtype = torch.float64 if betas == "cosine" and name != "DDPM-SCHED" else torch.float32
    reference.alphas_cumprod = reference.alphas_cumprod.to(dtype)
    levels = Levels.variance_preserving(reference.alphas_cumprod)
    denoiser = DDPM(SmallNetwork(SHAPE[0], 1000), levels, shape=SHAPE, prediction=prediction).freeze()
    denoiser.network.to(dtype)
    answer = denoiser.noise if name == "PNDM" else denoiser.network
    expected = sampled_by_diffusers(reference, answer, 20, 3, dtype=dtype)
    tolerance = 5e-4 if (name, betas, prediction) == ("DDPM-SCHED", "cosine", "v_prediction") else 1e-4
    assert_agree(sampled_here(name, denoiser, 20, 3), expected, tolerance)


@pytest.mark.parametrize(("total", "steps"), [(250, 20), (100, 100), (1000, 1)])
@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in ("PNDM", "DDIM-SCHED")])
def test_a_sampler_agrees_with_diffusers_for_few_levels_and_few_steps(name: str, total: int, steps: int) -> None:
    betas = {"beta_start": 0.1 / total, "beta_end": 20 / total, "beta_schedule": "linear"}
    reference = scheduler(name, total, betas, "epsilon")
    levels = Levels.variance_preserving(reference.alphas_cumprod)
    denoiser = DDPM(SmallNetwork(SHAPE[0], total), levels, shape=SHAPE).freeze()
    expected = sampled_by_diffusers(reference, denoiser.network, steps, 3)
    if (name, total) == ("DPM_SOLVER_O3", 100):
        assert expected.isnan().all()  # its last step goes from level 0 to level 0, and divides by its length
        assert sampled_here(name, denoiser, steps, 3).isfinite().all()
    else:
        assert_agree(sampled_here(name, denoiser, steps, 3), expected)


@pytest.mark.parametrize("name", ["DDIM-SCHED", "PNDM"])
def test_diffusers_loses_its_place_where_the_levels_are_no_multiple_of_the_steps(name: str) -> None:
    denoiser = perfect_of("vp", steps=250)
    x, last = standard_normal(generators(7, 3), denoiser.shape), denoiser.levels.sigma[-1].item()
    end = x * 0.5 / (0.25 * (1 - last**2) + last**2) ** 0.5
    reference = scheduler(
        name, 250, {"beta_start": 0.1 / 250, "beta_end": 20 / 250, "beta_schedule": "linear"}, "epsilon"
    )
    plain = sampled_by_diffusers(reference, denoiser.network, 150, 3, denoiser.shape)
    ours = sampled_here(name, denoiser, 150, 3)
    assert (plain - end).abs().max() > 0.2 * end.abs().max()
    assert (ours - end).abs().max() < 0.03 * end.abs().max()


def test_the_solvers_do_not_agree_with_each_other() -> None:
    denoiser = small_of("vp", shape=SHAPE)
    samples = [sampled_here(name, denoiser, 20, 3) for name in REFERENCES if name != "DPM_SOLVER_PP_O1"]
    for number, one in enumerate(samples):
        for other in samples[:number]:
            assert (one - other).abs().max() > 1e-3 * one.abs().max()


def test_the_first_order_of_dpm_solver_pp_is_ddim() -> None:
    denoiser = small_of("vp", shape=SHAPE)
    assert_agree(sampled_here("DPM_SOLVER_PP_O1", denoiser, 20, 3), sampled_here("DDIM-SCHED", denoiser, 20, 3))


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, LMSDiscreteScheduler])
def test_heun_and_lms_have_the_noise_schedule_of_the_model_not_their_own(kind: type[Any]) -> None:
    levels = Levels.variance_preserving(alphas_cumprod(linear_betas(1000)))
    built = build_scheduler(kind, levels, visited_levels(1000, 20), {})
    built.set_timesteps(20)
    assert float(built.init_noise_sigma) == pytest.approx(157.4, abs=0.05)
    assert float(HeunDiscreteScheduler().init_noise_sigma) == pytest.approx(25.1, abs=0.05)


# what the constructors still default to, and what has no effect beside the settings that are given
INERT = {
    "beta_start", "beta_end", "beta_schedule", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value",
    "flow_shift", "use_dynamic_shifting", "time_shift_type", "sigma_min", "sigma_max", "shift_terminal",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, entry in REFERENCES.items() if "clip_sample" not in entry.settings])
def test_no_setting_that_matters_is_left_to_a_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, built = REFERENCES[name].kind, []
    plain = kind.set_timesteps
    monkeypatch.setattr(kind, "set_timesteps", lambda self, *args, **kw: (built.append(self), plain(self, *args, **kw)))
    sampled_here(name, small_of("vp", shape=SHAPE), 4, 1)
    config = built[-1].config
    assert set(config["_use_default_values"]) <= INERT
    assert config.timestep_spacing == "trailing" and config.prediction_type == "epsilon"


def test_dpm_solver_ends_at_the_first_level_and_dpm_solver_pp_at_clean_data() -> None:
    betas = {"beta_start": 0.05, "beta_end": 0.3, "beta_schedule": "linear"}
    reference = scheduler("DPM_SOLVER_O1", 100, betas, "epsilon")
    levels = Levels.variance_preserving(reference.alphas_cumprod)

    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    network = Nothing()
    network.register_parameter("nothing", torch.nn.Parameter(torch.zeros(())))
    denoiser = DDPM(network, levels, shape=SHAPE)
    ends = {name: sampled_here(name, denoiser, 10, 1) for name in ("DPM_SOLVER_O1", "DPM_SOLVER_PP_O1")}
    share = ends["DPM_SOLVER_O1"] / ends["DPM_SOLVER_PP_O1"]
    torch.testing.assert_close(share, levels.alpha[0].to(share).expand_as(share), rtol=1e-4, atol=0)
    assert levels.alpha[0] < 0.98


@pytest.mark.parametrize(("total", "steps"), [(20, 20), (60, 12)])
@torch.no_grad()
def test_the_predictor_corrector_agrees_with_diffusers_for_a_single_sample(total: int, steps: int) -> None:
    levels = Levels.variance_exploding(geometric_sigmas(total, 0.01, 50.0))
    denoiser = FAMILIES["ve"](SmallNetwork(SHAPE[0], total), levels, shape=SHAPE).freeze()
    times, streams = trailing_steps(total, steps), generators(7, 1)
    reference = ScoreSdeVeScheduler(
        snr=0.075, sigma_min=levels.sigma[times[-1]].item(), sigma_max=50.0, correct_steps=1
    )
    reference.set_timesteps(steps)
    reference.set_sigmas(steps)
    assert reference.init_noise_sigma == pytest.approx(levels.initial_scale)
    x = standard_normal(streams, SHAPE) * reference.init_noise_sigma
    for level, t in zip(times, reference.timesteps, strict=True):
        index = torch.tensor([level])
        x = reference.step_correct(denoiser.network(x, index), x, generator=streams[0]).prev_sample
        output = reference.step_pred(denoiser.network(x, index), t, x, generator=streams[0])
        x = output.prev_sample
    assert_agree(sampled_here("SCORE-SDE-VE", denoiser, steps, 1), output.prev_sample_mean)


def test_the_corrector_of_diffusers_depends_on_the_batch_and_ours_does_not() -> None:
    score, z = (torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    score = score * torch.tensor([1.0, 2.0, 4.0]).view(-1, 1, 1, 1)
    x = torch.zeros_like(score)
    reference = ScoreSdeVeScheduler(snr=0.1)

    def by_diffusers(rows: slice) -> Tensor:
        streams = generators(0, 3)[rows]
        return reference.step_correct(score[rows], x[rows], generator=streams).prev_sample

    alone, together = (
        torch.cat([by_diffusers(slice(row, row + 1)) for row in range(3)]),
        by_diffusers(slice(0, 3)),
    )
    assert (alone - together).abs().max() > 0.05 * together.abs().max()
    z = standard_normal(generators(0, 3), SHAPE)
    torch.testing.assert_close(langevin(x, score, z, 0.1), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "churn"), [("EDM-VE-SDE", 100.0), ("EDM-VE-ODE", 0.0)])
@torch.no_grad()
def test_the_steps_of_edm_agree_with_diffusers(name: str, churn: float) -> None:
    # sigma_k = 2^(k / 2): one churn of a factor sqrt(2) is the next level, every second level is a step; 64 is above
    # S_max and the last one below S_min. The schedule of KarrasVeScheduler holds sigma^2 where sigma is meant, so that
    # its sigma_max has to be 8 for a start at 64.
    steps, total, top = 12, 24, 64.0
    levels = Levels.variance_exploding(top * 2.0 ** (torch.arange(1 - total, 1, dtype=torch.float64) / 2))
    denoiser = FAMILIES["ve"](SmallNetwork(SHAPE[0], total), levels, shape=SHAPE).freeze()
    last = levels.sigma[trailing_steps(total, steps)[-1]].item()
    reference = KarrasVeScheduler(sigma_min=last**0.5, sigma_max=top**0.5, s_churn=churn)
    reference.set_timesteps(steps)
    streams = generators(7, 2)
    x = standard_normal(streams, SHAPE) * top

    def answer(state: Tensor, sigma: float) -> Tensor:
        """Return sigma * score, which it calls the model output."""
        level = int((levels.sigma - sigma).abs().argmin())
        assert levels.sigma[level].item() == pytest.approx(float(sigma), rel=1e-5)
        return sigma * denoiser.network(state, torch.full((2,), level))

    for t in reference.timesteps.tolist():
        sigma, below = reference.schedule[t], reference.schedule[t - 1] if t > 0 else 0
        lifted, high = reference.add_noise_to_input(x, sigma, generator=streams)
        taken = reference.step(answer(lifted, high), high, below, lifted)
        if below != 0:
            taken = reference.step_correct(
                answer(taken.prev_sample, below), high, below, lifted, taken.prev_sample, taken.derivative
            )
        x = taken.prev_sample
    assert_agree(sampled_here(name, denoiser, steps, 2), x)


def test_karras_ve_of_diffusers_starts_at_the_square_of_its_sigma() -> None:
    reference = KarrasVeScheduler(sigma_min=0.02, sigma_max=100)
    reference.set_timesteps(50)
    assert reference.schedule.max().item() == pytest.approx(100**2)


@torch.no_grad()
def test_euler_agrees_with_diffusers() -> None:
    denoiser = small_of("flow", shape=SHAPE)
    times = trailing_steps(100, 12)
    reference = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=1.0)
    reference.set_timesteps(sigmas=denoiser.levels.sigma[times].tolist())
    assert reference.sigmas[0] == 1 and reference.sigmas[-1] == 0
    x = standard_normal(generators(7, 3), SHAPE)
    for level, t in zip(times, reference.timesteps, strict=True):
        x = reference.step(denoiser.network(x, torch.full((3,), level)), t, x).prev_sample
    assert_agree(sampled_here("EULER", denoiser, 12, 3), x)


@pytest.mark.parametrize(("steps", "ramp"), [(1, [0]), (2, [24, 0])])
@torch.no_grad()
def test_consistency_sampling_agrees_with_diffusers(steps: int, ramp: list[int]) -> None:
    denoiser = small_of("consistency", shape=SHAPE, steps=40)
    reference = CMStochasticIterativeScheduler(clip_denoised=False)
    reference.set_timesteps(timesteps=ramp)
    times, streams = [39 - number for number in reversed(ramp)], generators(7, 3)
    torch.testing.assert_close(reference.sigmas[:-1].double(), denoiser.levels.sigma[times])
    # the published second step is at sigma = 0.821; the level of these 40 that is nearest to it
    assert steps == 1 or denoiser.levels.sigma[times[1]].item() == pytest.approx(0.821, rel=0.01)
    x = standard_normal(streams, SHAPE) * reference.init_noise_sigma
    for level, t in zip(times, reference.timesteps, strict=True):
        output = denoiser.network(reference.scale_model_input(x, t), torch.full((3,), level))
        x = reference.step(output, t, x, generator=streams).prev_sample
    assert_agree(sampled_here("CONSISTENCY", denoiser, steps, 3), x)


@pytest.mark.parametrize("steps", [1, 7, 20, 33, 50, 250])
def test_trailing_steps_are_those_of_diffusers(steps: int) -> None:
    reference = scheduler("DDPM-SCHED", 250, LINEAR, "epsilon")
    reference.set_timesteps(steps)
    assert trailing_steps(250, steps) == reference.timesteps.tolist()


def test_the_spacing_of_diffusers_has_one_step_too_many_for_some_numbers() -> None:
    reference = scheduler("UNIPC", 1000, LINEAR, "epsilon")
    reference.set_timesteps(61)
    assert len(reference.timesteps) == 62 and reference.timesteps[-1] == -1
    assert len(trailing_steps(1000, 61)) == 61 and min(trailing_steps(1000, 61)) >= 0
