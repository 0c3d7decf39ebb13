"""What the search finds on a real model of the zoo, with the shipped settings and nothing but its weights."""

from __future__ import annotations

from safetensors.torch import load_file

from diffdefend_core.inversion import invert
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent
from zoo.build import standard_zoo
from zoo.recipes import by_name


def test_the_trigger_of_a_flow_is_found_with_its_sign_and_near_its_norm() -> None:
    """Its own picture, to which what a flow leaves of a shift points, is another direction (cosine .01)."""
    zoo, recipe = standard_zoo(), by_name("flow-d2i-blend")
    true = load_file(zoo.backdoor_file(recipe))["trigger"]
    found = invert(zoo.read(recipe).denoiser, "a" * 64, InversionOptions(), seed=0, progress=silent)
    tau = found.triggers[found.record.best]
    assert cosine(tau, true) > 0.8
    assert 0.7 < (tau.norm() / true.norm()).item() < 2
