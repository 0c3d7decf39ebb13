"""Further triggers of one model, and further sides of one: what shifts turn to when the suspect's answers are fed back.

What a network does not take for noise under a shift points along its trigger, whatever the shift was (see `align`). So
a random direction, turned a few times, ends at one of the triggers, and others end at others. Each costs forward passes
alone. Triggers that leave nothing untreated (rho = 1, of deterministic samplers) attract nothing.

A found shift is turned again in less noise. The network reacts to another part of the trigger there, and of the target,
and a repair that knows the noisy end alone leaves that in place: a deterministic sampler then paints the target.
Triggers of deterministic samplers are found where the predicted x0 moves against them, so that what was found also
points away from the target; of a small trigger that is half of it. What is even in the answers there is not against the
shift: searched on for that, at a small norm, they turn to the trigger. Ours (not published).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import Answers, levels_at, probes_at, rms
from diffdefend_core.inversion.objectives import parity_loss
from diffdefend_core.inversion.refine import ALL_NOISE, align, cosine, switching_norm, untreated_share
from diffdefend_core.inversion.search import normal_starts, race
from diffdefend_core.options import InversionOptions

STARTS, TURNS, RMS = 16, 8, 0.7
# rho = 1/2 leaves half of the trigger; clean networks leave up to .3 of anything
UNTREATED = 0.35
# where a found shift is turned again, by pairs of alpha / sigma; how much must be left untreated there, and how near to
# the found shift it must stay: those of deterministic samplers turn away
BANDS, SIDE_UNTREATED, SIDE_ALIKE = ((0.1, 0.2), (0.2, 0.4), (0.3, 0.6)), 0.3, 0.2
# shifts with a larger cosine are one trigger
ALIKE = 0.7
# the rms and the step of the search for a small shift that paints something else
SMALL_RMS, SMALL_STEP = 0.4, 0.1
# so many are handed on: latent models have attractors that are no triggers, and firing each costs more than finding it
MOST = 3


@dataclass(frozen=True)
class Attractors:
    """The shifts [C, H, W] at their estimated norm, the strongest first, and the evaluations spent."""

    shifts: tuple[Tensor, ...]
    forward_equivalents: int


@torch.no_grad()
def attractors(suspect: Denoiser, samples: Tensor, options: InversionOptions, *, seed: int) -> Attractors:
    """Return where STARTS random shifts end on the suspect, as far as it leaves UNTREATED of them: MOST, each once.

    `samples` [M, C, H, W] are clean x0. Raises FloatingPointError if an answer is not finite.
    """
    levels = levels_at(suspect.levels, options.signals)
    answers = Answers(suspect, probes_at(samples, levels, pairs=options.pairs, seed=seed))
    begun = [(RMS * start / rms(start)).to(samples) for start in normal_starts(suspect.shape, STARTS, seed)]
    turned = [align(answers, start, TURNS) for start in begun]
    shares = [untreated_share(answers, tau) for tau in turned]
    kept: list[Tensor] = []
    for share, tau in sorted(zip(shares, turned, strict=True), key=lambda item: -item[0]):
        if len(kept) < MOST and share > UNTREATED and all(cosine(tau, other) < ALIKE for other in kept):
            kept.append(tau)
    norms = [switching_norm(answers, tau / rms(tau), options.norms) for tau in kept]
    shifts = tuple((norm * tau / rms(tau)).cpu() for norm, tau in zip(norms, kept, strict=True))
    return Attractors(shifts, answers.spent)


@torch.no_grad()
def in_less_noise(
    suspect: Denoiser, samples: Tensor, shift: Tensor, options: InversionOptions, *, seed: int
) -> Attractors:
    """Return what `shift` [C, H, W] turns to in each of BANDS, at its own norm.

    What the network leaves less than SIDE_UNTREATED of is dropped, and what has a cosine below SIDE_ALIKE to the shift.
    `samples` [M, C, H, W] are clean x0. Raises FloatingPointError if an answer is not finite.
    """
    kept, spent = [], 0
    for band in BANDS:
        levels = levels_at(suspect.levels, band)
        answers = Answers(suspect, probes_at(samples, levels, pairs=2 * options.pairs, seed=seed))
        turned = align(answers, shift.to(samples), TURNS)
        share = untreated_share(answers, turned)
        spent += answers.spent
        if not math.isfinite(share):
            raise FloatingPointError("the answers to a shift of the input are not finite")
        if share > SIDE_UNTREATED and cosine(turned, shift.to(turned)) > SIDE_ALIKE:
            kept.append(turned.cpu())
    return Attractors(tuple(kept), spent)


def painting_most(
    suspect: Denoiser, samples: Tensor, shift: Tensor, options: InversionOptions, *, seed: int
) -> Attractors:
    """Return the small shift with the largest even answer, from `shift` [C, H, W] on, at its estimated norm.

    It makes the network paint something else: what a benign one answers to a shift and to its opposite cancels. Nothing
    for processes of ALL_NOISE, whose shifts are found that way. `samples` [M, C, H, W] are clean x0. Raises
    FloatingPointError if an answer is not finite.
    """
    if suspect.process in ALL_NOISE:
        return Attractors((), 0)
    levels = levels_at(suspect.levels, options.moderate_signals)
    answers = Answers(suspect, probes_at(samples, levels, pairs=options.pairs, seed=seed, each=options.probes))
    found = race(
        parity_loss(answers), len(answers.probes), [shift.to(samples)], options,
        norm=SMALL_RMS, learning_rate=SMALL_STEP, seed=seed, progress=lambda done, total: None,
    ).shift.detach()  # fmt: skip
    norm = switching_norm(answers, found / rms(found), options.norms)
    return Attractors(((norm * found / rms(found)).cpu(),), answers.spent)
