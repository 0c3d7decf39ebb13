"""The samplers that stand for the kinds: one each that fits, none twice."""

from __future__ import annotations

import torch
from analytic import clean_denoiser, vp_levels

from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.samplers import covering, fitting


def test_a_vp_model_is_covered_by_one_of_each_kind() -> None:
    model = clean_denoiser(vp_levels())
    found = covering(model)
    assert {kind: entry.name for kind, entry in found.items()} == {
        "stochastic": "DDPM-SCHED", "deterministic": "DDIM-SCHED", "multistep": "UNIPC",
    }  # fmt: skip
    assert found["stochastic"].stochastic and not found["deterministic"].stochastic


def test_a_flow_has_no_stochastic_and_no_multistep_one() -> None:
    model = clean_denoiser(vp_levels())
    model.levels = Levels.rectified_flow((torch.arange(1000) + 1) / 1000)
    assert {kind: entry.name for kind, entry in covering(model).items()} == {"deterministic": "EULER"}
    assert all(entry in fitting(model) for entry in covering(model).values())
