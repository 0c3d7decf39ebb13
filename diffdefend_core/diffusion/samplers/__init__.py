"""Samplers by their published names. A new one is a file here and a line in `TABLE`."""

from __future__ import annotations

from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import Generators
from diffdefend_core.diffusion.samplers.ancestral import ddpm
from diffdefend_core.diffusion.samplers.base import Entry, Progress, Sampler, trailing_steps
from diffdefend_core.diffusion.samplers.implicit import ddim
from diffdefend_core.errors import InputError

VP = frozenset(("vp",))
VE = frozenset(("ve",))

# The first deterministic and the first stochastic entry that fit a model are those by which it is probed.
TABLE = (
    Entry(name="DDPM-SCHED", run=ddpm, processes=VP, steps=1000, stochastic=True, source="Ho et al. 2020"),
    Entry(name="DDIM-SCHED", run=ddim, processes=VP, steps=50, stochastic=False, source="Song et al. 2021"),
)
SAMPLERS = {entry.name: entry for entry in TABLE}


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


def usual(denoiser: Denoiser) -> Entry:
    """Return the sampler for plain samples of a model: the deterministic one of `probing`, else the only one."""
    return probing(denoiser)[-1]


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
    "SAMPLERS", "TABLE", "Entry", "Progress", "Sampler", "ddim", "ddpm", "find", "fitting", "probing", "sample",
    "steps_for", "trailing_steps", "usual",
]  # fmt: skip
