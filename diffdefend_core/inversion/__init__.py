"""Trigger inversion: the shift of the initial noise to which a model answers as a backdoored one would.

`invert` draws the model's own samples, trains the forgetful twin on them (`twin`), races several starts for a shift
that both answer differently over many levels (`search`), turns the best ones to the trigger's shape and norm
(`refine`), and measures every candidate on fresh noise. No data, no reference model, no sign, no scale and no attack is
assumed.
"""

from diffdefend_core.inversion import elijah, purediffusion, terd
from diffdefend_core.inversion.invert import Inversion, invert
from diffdefend_core.inversion.samples import own_samples

__all__ = ["Inversion", "elijah", "invert", "own_samples", "purediffusion", "terd"]
