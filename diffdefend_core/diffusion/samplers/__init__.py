"""Samplers by name. A new one is a file here and a line in `SAMPLERS`."""

from diffdefend_core.diffusion.samplers.ancestral import ddpm
from diffdefend_core.diffusion.samplers.base import Progress, Sampler, trailing_steps
from diffdefend_core.diffusion.samplers.implicit import ddim

SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim}

__all__ = ["SAMPLERS", "Progress", "Sampler", "ddim", "ddpm", "trailing_steps"]
