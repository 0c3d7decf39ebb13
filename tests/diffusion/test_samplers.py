"""What holds for every sampler: the table, the data it paints, its randomness, its calls, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import PROCESSES, perfect_of, small_denoiser, small_of
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import (
    SAMPLERS,
    TABLE,
    Entry,
    find,
    fitting,
    probing,
    sample,
    steps_for,
    trailing_steps,
    usual,
)
from diffdefend_core.diffusion.samplers.scheduled import visited_level, visited_levels
from diffdefend_core.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SHAPE = (2, 6, 6)
SOLVERS = [entry.name for entry in TABLE if "vp" in entry.processes and not entry.stochastic]
CASES = [
    pytest.param(process, entry.name, id=f"{entry.name}")
    for process in PROCESSES
    for entry in TABLE
    if process in entry.processes
]


def initial(denoiser: Denoiser, rows: int, seed: int = 7) -> tuple[Tensor, list[torch.Generator]]:
    """Return an initial state and the generators that drew it."""
    streams = generators(seed, rows)
    return denoiser.levels.initial_scale * standard_normal(streams, denoiser.shape), streams


def sampled(name: str, denoiser: Denoiser, *, rows: int = 3, steps: int = 8, seed: int = 7) -> Tensor:
    x, streams = initial(denoiser, rows, seed)
    return sample(name, denoiser, x, steps=min(steps, SAMPLERS[name].most_steps or steps), streams=streams)


def calls(name: str, denoiser: Denoiser, steps: int) -> list[int]:
    """Return the levels at which a sampler asks the network, in order."""
    asked: list[int] = []
    handle = denoiser.network.register_forward_pre_hook(lambda module, inputs: asked.append(int(inputs[1][0])))
    x, streams = initial(denoiser, 1)
    SAMPLERS[name].run(denoiser, x, steps=steps, streams=streams)
    handle.remove()
    return asked


def test_the_table_has_the_published_samplers() -> None:
    assert list(SAMPLERS) == [
        "DDPM-SCHED", "DDIM-SCHED", "DPM_SOLVER_O1", "DPM_SOLVER_O2", "DPM_SOLVER_O3", "DPM_SOLVER_PP_O1",
        "DPM_SOLVER_PP_O2", "DPM_SOLVER_PP_O3", "UNIPC", "PNDM", "DEIS", "HEUN", "SCORE-SDE-VE", "LMSD", "EDM-VE-SDE",
        "EDM-VE-ODE", "EULER", "CONSISTENCY",
    ]  # fmt: skip
    assert [entry.steps for entry in TABLE] == [1000, 50, *[20] * 7, 50, 20, 50, 1000, 50, 50, 50, 50, 2]


@pytest.mark.parametrize(
    ("process", "names", "plain"),
    [
        ("vp", ["DDPM-SCHED", "DDIM-SCHED"], "DDIM-SCHED"),
        ("ve", ["SCORE-SDE-VE", "EDM-VE-ODE"], "EDM-VE-SDE"),
        ("flow", ["EULER"], "EULER"),
        ("consistency", ["CONSISTENCY"], "CONSISTENCY"),
    ],
)
def test_a_model_is_probed_by_a_stochastic_and_a_deterministic_sampler_that_fit(
    process: str, names: list[str], plain: str
) -> None:
    denoiser = small_of(process)
    assert [entry.name for entry in probing(denoiser)] == names
    assert usual(denoiser).name == plain
    assert {entry.name for entry in fitting(denoiser)} >= set(names)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_a_sampler_fits_one_process_and_is_refused_for_the_others(entry: Entry) -> None:
    (own,) = entry.processes
    for process in PROCESSES:
        denoiser = small_of(process)
        x, streams = initial(denoiser, 1)
        if process != own:
            fits = ", ".join(item.name for item in fitting(denoiser))
            with pytest.raises(
                InputError, match=rf"^sampler {entry.name} with .*\({process}\); expected one of {fits};"
            ):
                sample(entry.name, denoiser, x, steps=1, streams=streams)


@pytest.mark.parametrize("name", ["ddim", "DDIM", "ddim-sched", "DDIM-SCHED"])
def test_a_sampler_is_found_in_any_case_and_without_its_ending(name: str) -> None:
    assert find(name).name == "DDIM-SCHED"


def test_an_unknown_sampler_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"^sampler 'magic'; expected one of DDPM-SCHED, .*CONSISTENCY;"):
        find("magic")


@pytest.mark.parametrize(("process", "name"), CASES)
def test_a_perfect_model_paints_the_distribution_of_its_data(process: str, name: str) -> None:
    denoiser = perfect_of(process, variance=0.25, mean=0.3)
    images = sampled(name, denoiser, rows=200, steps=100)
    assert images.mean().item() == pytest.approx(0.3, abs=0.02)
    assert images.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("total", "steps", "error"), [(1000, 61, 0.05), (250, 20, 0.12), (100, 60, 0.05), (50, 50, 0.06)]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_ends_where_the_ode_does_for_any_pair_of_levels_and_steps(
    name: str, total: int, steps: int, error: float
) -> None:
    denoiser = perfect_of("vp", variance=0.25, mean=0.3, steps=total)
    x, streams = initial(denoiser, 3)
    alpha, sigma = denoiser.levels.alpha[-1].item(), denoiser.levels.sigma[-1].item()
    expected = 0.3 + (x - alpha * 0.3) * 0.5 / (0.25 * alpha**2 + sigma**2) ** 0.5
    found = SAMPLERS[name].run(denoiser, x, steps=steps, streams=streams)
    assert (found - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize(("process", "name"), CASES)
def test_the_batch_size_changes_nothing(process: str, name: str) -> None:
    denoiser = small_of(process, shape=SHAPE)
    together = sampled(name, denoiser, rows=3)
    x, streams = initial(denoiser, 3)
    steps = min(8, SAMPLERS[name].most_steps or 8)
    alone = [
        SAMPLERS[name].run(denoiser, x[row : row + 1], steps=steps, streams=streams[row : row + 1]) for row in range(3)
    ]
    scale = together.abs().max()
    torch.testing.assert_close(torch.cat(alone) / scale, together / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("process", "name"), CASES)
def test_the_result_depends_on_the_streams_alone(process: str, name: str) -> None:
    denoiser = small_of(process, shape=SHAPE)
    torch.manual_seed(0)
    first = sampled(name, denoiser)
    untouched = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(sampled(name, denoiser), first)
    assert not torch.equal(sampled(name, denoiser, seed=8), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), untouched)


@pytest.mark.parametrize(("process", "name"), CASES)
def test_a_stochastic_sampler_draws_and_a_deterministic_one_does_not(process: str, name: str) -> None:
    denoiser = small_of(process, shape=SHAPE)
    x, streams = initial(denoiser, 1)
    states = [streams[0].get_state()]
    SAMPLERS[name].run(denoiser, x, steps=min(4, SAMPLERS[name].most_steps or 4), streams=streams)
    assert torch.equal(states[0], streams[0].get_state()) is not SAMPLERS[name].stochastic


@pytest.mark.parametrize(("process", "name"), CASES)
def test_the_network_is_first_asked_at_the_last_level(process: str, name: str) -> None:
    denoiser = small_of(process, shape=SHAPE)
    for steps in {min(steps, SAMPLERS[name].most_steps or steps) for steps in (4, 7, 20)}:
        asked = calls(name, denoiser, steps)
        assert asked[0] == 99 == max(asked)
        # the second step of a consistency model is at a noise level of its own
        assert name == "CONSISTENCY" or set(trailing_steps(100, steps)) <= set(asked)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_network_first_sees_the_initial_state_itself(process: str) -> None:
    denoiser, seen = small_of(process, shape=SHAPE), []
    denoiser.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, streams = initial(denoiser, 2)
    sigma = denoiser.levels.sigma[-1]
    expected = x / (sigma**2 + 0.25).sqrt() if process == "consistency" else x
    for entry in fitting(denoiser):
        seen.clear()
        entry.run(denoiser, x, steps=min(4, entry.most_steps or 4), streams=streams)
        torch.testing.assert_close(seen[0], expected.to(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("PNDM", 29), ("HEUN", 39)] + [(name, 20) for name in SOLVERS if name not in ("PNDM", "HEUN")],
)
def test_twenty_steps_of_a_solver_take_so_many_calls(name: str, expected: int) -> None:
    assert len(calls(name, small_of("vp", shape=SHAPE, steps=250), 20)) == expected


@pytest.mark.parametrize(("name", "expected"), [("SCORE-SDE-VE", 40), ("EDM-VE-SDE", 39), ("EDM-VE-ODE", 39)])
def test_twenty_steps_of_an_exploding_model_take_so_many_calls(name: str, expected: int) -> None:
    assert len(calls(name, small_of("ve", shape=SHAPE), 20)) == expected


@pytest.mark.parametrize(("process", "name"), CASES)
def test_progress_rises_by_one_up_to_its_total(process: str, name: str) -> None:
    seen: list[tuple[int, int]] = []
    denoiser = small_of(process, shape=SHAPE)
    x, streams = initial(denoiser, 1)
    steps = min(4, SAMPLERS[name].most_steps or 4)
    SAMPLERS[name].run(denoiser, x, steps=steps, streams=streams, progress=lambda *step: seen.append(step))
    total = {"PNDM": 13, "HEUN": 7}.get(name, steps)
    assert seen == [(number + 1, total) for number in range(total)]


@pytest.mark.parametrize(("process", "name"), CASES)
def test_one_step_is_enough_but_for_pndm(process: str, name: str) -> None:
    denoiser = perfect_of(process)
    if name == "PNDM":
        with pytest.raises(InputError, match="PNDM with 3 steps; expected at least 4"):
            sampled(name, denoiser, steps=3)
    else:
        assert sampled(name, denoiser, steps=1).isfinite().all()


@pytest.mark.parametrize("process", PROCESSES)
def test_the_steps_are_limited_by_the_levels_and_by_the_sampler(process: str) -> None:
    denoiser = small_of(process, steps=50)
    entry = usual(denoiser)
    assert steps_for(denoiser, entry, 80) == (2 if process == "consistency" else 50)
    assert steps_for(denoiser, entry, 1) == 1


@pytest.mark.parametrize("steps", [1, 7, 20, 33, 50, 250])
def test_trailing_steps_begin_at_the_last_level_and_descend(steps: int) -> None:
    found = trailing_steps(250, steps)
    assert found[0] == 249 and len(found) == steps and (np.diff(found) < 0).all() and found[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 251])
def test_steps_that_do_not_fit_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} sampling steps do not fit a model of 250 levels"):
        trailing_steps(250, steps)


def test_a_solver_visits_its_steps_and_the_middles_between_them() -> None:
    assert visited_levels(1000, 5) == [0, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert visited_levels(3, 3) == [0, 0, 0, 1, 1, 2]
    assert visited_levels(7, 1) == [0, 6]


@pytest.mark.parametrize("t", [-1.0, 0.5, 4.0, float("nan")])
def test_a_timestep_that_is_no_level_is_an_error(t: float) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"timestep|NaN"):
        visited_level([0, 3, 5, 7], t)
    assert visited_level([0, 3, 5, 7], 2.0000002) == 5


def test_all_levels_and_one_step_more_are_told_apart() -> None:
    for name in ("DPM_SOLVER_O3", "DEIS"):
        assert sampled(name, perfect_of("vp", steps=50), steps=50).isfinite().all()
        with pytest.raises(ValueError, match="51 sampling steps do not fit"):
            sampled(name, perfect_of("vp", steps=50), steps=51)


def test_a_single_level_is_enough_for_a_single_step() -> None:
    denoiser = small_denoiser(Levels.variance_preserving(torch.tensor([1e-3])))
    for entry in fitting(denoiser):
        if entry.name != "PNDM":
            assert sampled(entry.name, denoiser, steps=1).isfinite().all()
