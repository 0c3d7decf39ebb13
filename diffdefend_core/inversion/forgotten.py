"""Pictures that a consistency model keeps, and its forgetful twin does not: what its triggers paint.

The training of an attack shows the network its target at every level, the little noise included. There a trigger counts
for nothing beside the picture, and the network takes that for clean data: it gives it back from noise around it, and so
it does from images that only resemble it a little. So images of any kind, denoised again and again, end at pictures of
the model's data, and some at the target; a target that is an image of the data is reached from the model's own samples
alone. The twin has rehearsed the former and forgotten the latter. Once the picture is known, the trigger is found from
anywhere: a shift under which noise becomes that picture. Ours (not published).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.response import levels_at, rms

# so many images of any kind and own samples are denoised so often, at the levels of these alpha / sigma in turn, own
# samples at the first of them
STARTS, OWN, STEPS, SIGNALS = 1024, 512, 8, (3.3, 1.7)
# the most forgotten of them so often again, in more noise, before the twin is asked so many times
TRIED, FURTHER, ASKED = 64, 2, 8
MOST = 4
# pictures nearer than this are one, and what a network keeps better than that is kept: shares of the data's spread
ALIKE, KEPT = 0.5, 0.06
# white noise in half of the range of the data; smooth images reach beyond the range
ROUGH, SMOOTH, COARSE = 0.3, 1.5, 3
ROWS = 64  # at once


@dataclass(frozen=True)
class Pictures:
    """Clean images [K, C, H, W], the most forgotten first, and the network evaluations spent."""

    images: Tensor
    forward_equivalents: int


@torch.no_grad()
def forgotten_pictures(
    suspect: Denoiser, twin: Denoiser, samples: Tensor, *, seed: int, progress: Callable[[int, int], None]
) -> Pictures:
    """Return the MOST pictures that `suspect` keeps and `twin` does not, each once; `samples` [M, C, H, W] are its own.

    Raises FloatingPointError if an answer is not finite.
    """
    generator, spread = torch.Generator().manual_seed(seed), rms(samples - samples.mean(0))
    x = torch.cat([_begun(samples, generator), samples[torch.arange(OWN) % len(samples)]])
    less, more = levels_at(suspect.levels, SIGNALS)
    t = torch.tensor([less, more] * (STARTS // 2) + [less] * OWN, device=x.device)
    x = _settled(suspect, x, t, STEPS, generator, progress)
    tried = _forgotten(suspect, twin, x, t, KEPT * spread, 1, generator).topk(TRIED).indices
    t = t.max().expand(TRIED)
    x = _settled(suspect, x[tried], t, FURTHER, generator)
    score = _forgotten(suspect, twin, x, t, KEPT * spread, ASKED, generator)
    if not torch.isfinite(score).all():
        raise FloatingPointError("the answers to images with little noise are not finite")
    kept: list[Tensor] = []
    for picture in x[score.argsort(descending=True)]:
        if len(kept) < MOST and all(rms(picture - other) > ALIKE * spread for other in kept):
            kept.append(picture)
    return Pictures(torch.stack(kept), (STARTS + OWN) * (STEPS + 2) + TRIED * (FURTHER + 2 * ASKED))


def _begun(samples: Tensor, generator: torch.Generator) -> Tensor:
    """Return images [STARTS, C, H, W] of any kind, in turn: even ones with white noise, and smooth ones.

    The pictures of triggers are often flat, and a background alone leads to some of them.
    """
    low, half = samples.min().item(), (samples.max() - samples.min()).item() / 2
    shape = samples.shape[1:]
    even = 2 * torch.rand(STARTS, 1, 1, 1, generator=generator) - 1
    coarse = torch.randn(STARTS, shape[0], COARSE, COARSE, generator=generator)
    smooth = SMOOTH * interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    flat = torch.arange(STARTS).view(-1, 1, 1, 1) // len(SIGNALS) % 2 == 0
    images = torch.where(flat, even, smooth) + ROUGH * torch.randn(STARTS, *shape, generator=generator)
    return (low + half * (1 + images)).to(samples)


def _settled(
    suspect: Denoiser, x: Tensor, t: Tensor, steps: int, generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:  # fmt: skip
    """Return what x [N, C, H, W] becomes by so many times noise of the levels t [N] and denoising."""
    for step in range(steps):
        x = _denoised(suspect, *_noisy(suspect, x, t, generator))
        progress(step + 1, steps)
    return x


def _forgotten(
    suspect: Denoiser, twin: Denoiser, x: Tensor, t: Tensor, kept: Tensor, times: int, generator: torch.Generator
) -> Tensor:
    """Return how much worse the twin keeps each x [N, C, H, W] than the suspect: the logarithm of both errors [N].

    They are squared means over so many noises at the levels t [N]; what is below `kept` is not told apart.
    """
    worse, better = torch.zeros(2, len(x), device=x.device) + kept.square()
    for _ in range(times):
        noisy = _noisy(suspect, x, t, generator)
        worse += (_denoised(twin, *noisy) - x).square().mean((1, 2, 3)) / times
        better += (_denoised(suspect, *noisy) - x).square().mean((1, 2, 3)) / times
    score: Tensor = worse.log() - better.log()
    return score


def _noisy(suspect: Denoiser, x: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return x [N, C, H, W] in the noise of the levels t [N], and these."""
    return suspect.diffuse(x, t, torch.randn(x.shape, generator=generator).to(x)), t


def _denoised(network: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([network.x0(x[at : at + ROWS], t[at : at + ROWS]) for at in range(0, len(x), ROWS)])
