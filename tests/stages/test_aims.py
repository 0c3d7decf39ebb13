"""What a repair removes, where, and how far: of every shift, patch and picture that a flagged model has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import sample_records
import torch
from analytic import SmallNetwork, small_of, vp_levels
from torch import Tensor

from diffdefend_core.config import load_settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.evaluation import Backdoor
from diffdefend_core.inversion.attractors import Attractors
from diffdefend_core.purification.losses import QUIET_SHARE
from diffdefend_core.stages import aims
from diffdefend_core.stages.aims import (
    AHEAD,
    IN_NOISE,
    OF_CHOICE,
    QUIET_UNLED,
    REMOVAL_AT_ONCE,
    REMOVAL_OF_CHOICE,
    REMOVAL_SIGNALS,
    Suspect,
)
from diffdefend_core.stages.effects import Effects
from diffdefend_core.stages.folder import run_once, write_record


def suspect_of(
    denoiser: Denoiser, shifts: list[Tensor], folder: Path, *, firing: bool = False, sided: bool = False
) -> Suspect:
    picture = torch.zeros(denoiser.picture_shape)
    backdoors = (Backdoor(shifts[0], picture, "EULER"),) if firing else ()
    return Suspect(
        denoiser=denoiser, folder=folder, samples=torch.zeros(4, *denoiser.shape), further=0, forward_equivalents=0,
        shifts=shifts, small=False, sided=sided,
        effects=Effects(load_settings(), backdoors=backdoors, firing=("parity",) if firing else ()),
    )  # fmt: skip


class Doubles:
    """An autoencoder of pictures of twice the size."""

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures[..., ::2, ::2]

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("process", ["vp", "consistency"])
def test_of_consistency_models_each_picture_is_searched_again(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def search(suspect: Denoiser, samples: Tensor, picture: Tensor, options: Any, *, seed: int) -> Attractors:
        seeds.append(seed)
        return Attractors((picture,), 7)

    suspect = small_of(process)
    pictures = (torch.zeros(suspect.shape), torch.ones(suspect.shape))
    monkeypatch.setattr(Effects, "targets", lambda *given: pictures)
    monkeypatch.setattr(aims, "led_again", search)
    settings = load_settings(seed=3)
    found = aims._led_again(suspect, torch.zeros(4, *suspect.shape), Effects(settings), settings)
    assert seeds == ([3, 4] if process == "consistency" else [])
    assert [item.shifts for item in found] == [(picture,) for picture in pictures][: len(seeds)]


@pytest.mark.parametrize(("process", "firing", "sided", "signals", "noise", "beyond", "settles"), [
    ("flow", True, False, REMOVAL_SIGNALS, (QUIET_SHARE, 1.0), AHEAD, True),  # the picture of a flow's is unlearned
    ("flow", False, False, REMOVAL_OF_CHOICE, (QUIET_SHARE, 1.0), OF_CHOICE, True),
    ("flow", False, True, REMOVAL_SIGNALS, (QUIET_SHARE, 1.0), 0.0, False),
    ("vp", True, False, REMOVAL_SIGNALS, (QUIET_SHARE, 1.0), AHEAD, False),
    ("vp", False, True, REMOVAL_SIGNALS, (QUIET_SHARE, IN_NOISE), 0.0, False),
    # half of its trigger may be quieter noise, and it is decided where the loss hardly looks
    ("vp", False, False, REMOVAL_SIGNALS, (QUIET_UNLED, IN_NOISE), AHEAD, False),
    ("ve", True, False, REMOVAL_SIGNALS, (QUIET_SHARE, IN_NOISE), AHEAD, False),
    ("ve", False, False, REMOVAL_SIGNALS, (QUIET_SHARE, 1.0), AHEAD, False),
    ("consistency", False, False, REMOVAL_AT_ONCE, (QUIET_SHARE, 1.0), AHEAD, False),
])  # fmt: skip
def test_where_a_shift_is_removed_and_how_far_beyond(
    process: str,
    firing: bool,
    sided: bool,
    signals: tuple[float, float],
    noise: tuple[float, float],
    beyond: float,
    settles: bool,
    tmp_path: Path,
) -> None:
    """A consistency model hands no trigger on to the levels below; one that leads to no single picture chooses."""
    denoiser = small_of(process)
    suspect = suspect_of(denoiser, [torch.ones(denoiser.shape)], tmp_path, firing=firing, sided=sided)
    found = aims.aims_of(suspect, ())
    assert [(item.signals, item.quiet, found.in_noise) for item in found.removals] == [(signals, *noise)]
    assert (found.beyond, found.settles) == (beyond, settles)


@pytest.mark.parametrize(("patches", "noise"), [(1, (QUIET_UNLED, IN_NOISE)), (2, (QUIET_SHARE, 1.0))])
def test_what_is_a_patch_in_all_its_shapes_is_no_choice_by_noise(
    patches: int, noise: tuple[float, float], tmp_path: Path
) -> None:
    denoiser = small_of("vp")
    patch, whole = torch.zeros(denoiser.shape), torch.ones(denoiser.shape)
    patch[..., -2:, -2:] = 3.0
    found = aims.aims_of(suspect_of(denoiser, [patch, patch if patches == 2 else whole], tmp_path), ())
    assert {(item.quiet, found.in_noise) for item in found.removals} == {noise}


def test_errors_in_much_noise_count_more_of_latents_in_any_case(tmp_path: Path) -> None:
    latent = LatentDiffusion(
        SmallNetwork(1, 100), vp_levels(100), Doubles(), shape=(1, 8, 8), picture_shape=(1, 16, 16)
    )
    found = aims.aims_of(suspect_of(latent, [torch.ones(latent.shape)], tmp_path, sided=True), ())
    assert ([item.quiet for item in found.removals], found.in_noise) == ([QUIET_SHARE], IN_NOISE)


def test_of_a_patch_only_the_best_shift_is_removed() -> None:
    """The others know its place alone, and would take its rows."""
    patch, scattered, elsewhere = torch.zeros(3, 1, 8, 8)
    patch[..., -2:, -2:], elsewhere[..., :2, :2] = 0.9, 0.9
    scattered[..., -2:, -2:] = torch.tensor([[3.0, -4.0], [-2.0, 5.0]])
    found = {"monotonicity": scattered, "parity": patch, "quiet": elsewhere}
    assert list(aims._once(found, "parity")) == ["parity", "quiet"]
    assert aims._unlike((scattered, torch.ones(1, 8, 8)), {"parity": patch}).keys() == {"further-2"}
    whole = {"monotonicity": torch.ones(1, 8, 8), "parity": torch.ones(1, 8, 8)}
    assert aims._once(whole, "parity") == whole


@pytest.mark.parametrize(
    ("still_fires", "by_any", "process", "unlearned"),
    [
        (None, False, "vp", False), (0.0, False, "vp", False), (0.05, False, "vp", True), (None, True, "vp", True),
        (None, False, "flow", True),
    ],
)  # fmt: skip
def test_pictures_are_unlearned_where_a_round_was_not_enough_of_any_sampler_and_of_flows(
    tmp_path: Path, still_fires: float | None, by_any: bool, process: str, unlearned: bool
) -> None:
    earlier: tuple[str, ...] = ()
    if still_fires is not None:
        record = dataclasses.replace(sample_records.purified(), still_fires=still_fires)
        earlier = (
            run_once(
                "purify_round", store=f"file://{tmp_path}", parents=(), options={},
                work=lambda folder: write_record(folder, "purified", record),
            ),
        )  # fmt: skip
    effects = Effects(load_settings(), by_any_sampler=by_any)
    assert aims._pictured(small_of(process), effects, earlier) is unlearned
