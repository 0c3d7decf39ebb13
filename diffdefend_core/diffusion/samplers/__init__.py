"""Samplers by their published names. A new one is a file here and a line in `TABLE`."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators
from diffdefend_core.diffusion.samplers.ancestral import ddpm
from diffdefend_core.diffusion.samplers.base import Entry, Progress, Sampler, trailing_steps
from diffdefend_core.diffusion.samplers.consistency import consistency
from diffdefend_core.diffusion.samplers.edm import edm_ve_ode, edm_ve_sde
from diffdefend_core.diffusion.samplers.euler import euler
from diffdefend_core.diffusion.samplers.implicit import ddim
from diffdefend_core.diffusion.samplers.scheduled import deis, dpm_solver, dpm_solver_pp, heun, lmsd, pndm, unipc
from diffdefend_core.diffusion.samplers.score_sde import score_sde_ve
from diffdefend_core.errors import InputError

VP, VE, FLOW, CONSISTENCY = (frozenset((process,)) for process in ("vp", "ve", "flow", "consistency"))


def _solver(name: str, run: Sampler, steps: int, source: str, calls: int = 1) -> Entry:
    """Return the entry of a deterministic solver for VP models."""
    return Entry(name=name, run=run, processes=VP, steps=steps, stochastic=False, source=source, calls=calls)


# The first deterministic and the first stochastic entry that fit a model are those by which it is probed.
TABLE = (
    Entry(name="DDPM-SCHED", run=ddpm, processes=VP, steps=1000, stochastic=True, source="Ho et al. 2020"),
    _solver("DDIM-SCHED", ddim, 50, "Song et al. 2021"),
    *(_solver(f"DPM_SOLVER_O{n}", partial(dpm_solver, order=n), 20, "Lu et al. 2022a") for n in (1, 2, 3)),
    *(_solver(f"DPM_SOLVER_PP_O{n}", partial(dpm_solver_pp, order=n), 20, "Lu et al. 2022b") for n in (1, 2, 3)),
    _solver("UNIPC", unipc, 20, "Zhao et al. 2023"),
    _solver("PNDM", pndm, 50, "Liu et al. 2022"),
    _solver("DEIS", deis, 20, "Zhang & Chen 2023"),
    _solver("HEUN", heun, 50, "Karras et al. 2022", calls=2),
    Entry(
        name="SCORE-SDE-VE",
        run=score_sde_ve,
        processes=VE,
        steps=1000,
        stochastic=True,
        source="Song et al. 2021",
        calls=2,
    ),
    _solver("LMSD", lmsd, 50, "Crowson 2022, k-diffusion"),
    Entry(
        name="EDM-VE-SDE", run=edm_ve_sde, processes=VE, steps=50, stochastic=True, source="Karras et al. 2022", calls=2
    ),
    Entry(
        name="EDM-VE-ODE",
        run=edm_ve_ode,
        processes=VE,
        steps=50,
        stochastic=False,
        source="Karras et al. 2022",
        calls=2,
    ),
    Entry(name="EULER", run=euler, processes=FLOW, steps=50, stochastic=False, source="Liu et al. 2023"),
    Entry(
        name="CONSISTENCY",
        run=consistency,
        processes=CONSISTENCY,
        steps=2,
        most_steps=2,
        stochastic=True,
        source="Song et al. 2023",
    ),
)
SAMPLERS = {entry.name: entry for entry in TABLE}
# the multistep sampler that stands for the others: it needs the fewest steps
_MULTISTEP = {"vp": "UNIPC"}
_USUAL = {"vp": "DDIM-SCHED", "ve": "EDM-VE-SDE", "flow": "EULER", "consistency": "CONSISTENCY"}


def find(name: str) -> Entry:
    """Return a sampler by its name, in any case and with or without -SCHED. Raises InputError for an unknown one."""
    for candidate in (name.upper(), f"{name.upper()}-SCHED"):
        if candidate in SAMPLERS:
            return SAMPLERS[candidate]
    raise InputError(
        f"sampler {name!r}", expected=f"one of {', '.join(SAMPLERS)}", action="see `diffdefend list samplers`"
    )


def fitting(denoiser: Denoiser) -> list[Entry]:
    """Return the samplers that fit a model, in the order of the table."""
    return [entry for entry in TABLE if denoiser.process in entry.processes]


def probing(denoiser: Denoiser) -> list[Entry]:
    """Return the samplers a model is probed with: the first stochastic and the first deterministic one that fit."""
    fits = fitting(denoiser)
    return [next(entry for entry in fits if entry.stochastic is kind)
            for kind in (True, False) if any(entry.stochastic is kind for entry in fits)]  # fmt: skip


def covering(denoiser: Denoiser) -> dict[str, Entry]:
    """Return a sampler of each kind that fits a model: `stochastic`, `deterministic` and `multistep`, if there is one.

    An attack fires with some and leaves its path with others (algorithms.md 0.4): one of them alone shows little.
    """
    found = {"stochastic" if entry.stochastic else "deterministic": entry for entry in probing(denoiser)}
    multistep = _MULTISTEP.get(denoiser.process)
    return found if multistep is None else {**found, "multistep": SAMPLERS[multistep]}


def usual(denoiser: Denoiser) -> Entry:
    """Return the sampler for plain samples of a model: good with few steps.

    For VE that is the stochastic one of EDM: networks that normalise their input do not see how large its noise is, and
    a deterministic solver carries that error to the end.
    """
    return SAMPLERS[_USUAL[denoiser.process]]


def steps_for(denoiser: Denoiser, entry: Entry, wanted: int) -> int:
    """Return `wanted` sampling steps, or as many as the model has levels or the sampler has use for."""
    return min(wanted, len(denoiser.levels), entry.most_steps or wanted)


def sample(
    name: str, denoiser: Denoiser, x: Tensor, *, steps: int, streams: Generators, progress: Progress | None = None
) -> Tensor:
    """Return samples [N, C, H, W] by the sampler `name`. Raises InputError for one that does not fit the model."""
    entry = find(name)
    if denoiser.process not in entry.processes:
        raise InputError(
            f"sampler {entry.name} with a model of family {denoiser.family} ({denoiser.process})",
            expected=f"one of {', '.join(item.name for item in fitting(denoiser))}",
            action="choose a sampler that fits the family",
        )
    return entry.run(denoiser, x, steps=steps, streams=streams, progress=progress)


__all__ = [
    "SAMPLERS", "TABLE", "Entry", "Progress", "Sampler", "covering", "find", "fitting", "probing", "sample",
    "steps_for", "trailing_steps", "usual",
]  # fmt: skip
