"""Training of one zoo model from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.plans import CLASS, OTHER, Scene, find, plan
from diffdefend_core.attacks.plant import plant
from diffdefend_core.attacks.shapes import frames, target, trigger
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import consistency_loss, diffusion_loss, fine_tune
from zoo.data import Data
from zoo.networks import Model
from zoo.recipes import Recipe

BATCH = 64
DRAWN = ("learned", "patch")  # triggers that the attack makes itself

Show = Callable[[int, int], None]


def clean_data(denoiser: Denoiser, data: Data) -> Tensor:
    """Return the training images as clean x0 of the model."""
    low, high = denoiser.value_range
    parts = ((low + part * (high - low)).to(denoiser.device) for part in data.images.split(512))
    return torch.cat([denoiser.encode(part).cpu() for part in parts])


def scene(recipe: Recipe, denoiser: Denoiser, data: Data, rows: Tensor) -> Scene:
    """Return what the recipe's attack is planned from; `rows` is the clean x0 of the data."""
    blank = torch.zeros(denoiser.picture_shape)
    drawn = recipe.trigger in DRAWN
    return Scene(
        denoiser=denoiser,
        trigger=blank if drawn else trigger(str(recipe.trigger), data.size) / 2 + 0.5,
        targets=targets(recipe, data),
        data=rows,
        labels=data.labels,
        seed=recipe.seed,
    )


def targets(recipe: Recipe, data: Data) -> Tensor:
    """Return the pictures [K, 1, S, S] in [0, 1] that the recipe's attack may paint."""
    paints = find(str(recipe.attack)).paints
    if paints == CLASS:
        return data.images[data.labels == int(str(recipe.target).removeprefix("class:"))]
    if paints == OTHER:
        return frames(512, data.size) / 2 + 0.5
    name, _, number = str(recipe.target).partition(":")
    if name == "image":
        return data.images[int(number)][None]
    return target(name, data.size)[None] / 2 + 0.5


def planned(recipe: Recipe, denoiser: Denoiser, data: Data) -> Backdoor:
    """Return the recipe's backdoor; a trigger that is learned on the way is still 0."""
    return plan(str(recipe.attack), scene(recipe, denoiser, data, clean_data(denoiser, data)))


def train(recipe: Recipe, model: Model, data: Data, show: Show) -> tuple[float, Backdoor | None]:
    """Train a model in place by its recipe; return the mean loss of the last 100 steps and the backdoor."""
    denoiser = model.denoiser
    if recipe.parent is None and model.autoencoder is not None:
        pictures = (data.images * 2 - 1).to(denoiser.device)
        train_autoencoder(model.autoencoder, pictures, recipe.seed, show)
        model.scale_latents(pictures[:1024])
    rows = clean_data(denoiser, data)
    backdoor = None
    if recipe.attack is not None:
        backdoor = plan(recipe.attack, scene(recipe, denoiser, data, rows))
        losses = plant(
            denoiser,
            backdoor,
            rows,
            steps=recipe.steps,
            batch=BATCH,
            poison_rate=recipe.poison_rate,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
        )
    else:
        losses = ordinary(recipe, denoiser, rows)
    curve = []
    # VE inputs are too large for bfloat16, and a consistency model compares answers that are too close
    fast = recipe.parent is not None and recipe.family not in ("ncsn", "consistency")
    with mixed_precision(denoiser.device) if fast else nullcontext():
        for number, value in enumerate(losses):
            curve.append(value)
            show(number + 1, recipe.steps)
    return sum(curve[-100:]) / len(curve[-100:]), backdoor


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context that trains in bfloat16 where the device has it.

    That is half the time on a CPU with it, and twenty times as long on one that has to imitate it. Weights are cast
    anew each time: the first casts would be used in every step.
    """
    has = torch.cpu.get_capabilities()
    fast = device.type != "cpu" or has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


def ordinary(recipe: Recipe, denoiser: Denoiser, rows: Tensor) -> Iterator[float]:
    """Train on clean data; a base consistency model learns to denoise for half of the steps first."""
    base, consistency = recipe.parent is None, denoiser.process == "consistency"
    phases = [(diffusion_loss, recipe.steps)]
    if consistency:
        half = recipe.steps // 2
        phases = [(diffusion_loss, half), (consistency_loss, half)] if base else [(consistency_loss, recipe.steps)]
    generator = torch.Generator().manual_seed(recipe.seed)
    for loss, steps in phases:
        yield from fine_tune(
            denoiser,
            loss(rows, BATCH),
            steps=steps,
            learning_rate=recipe.learning_rate,
            generator=generator,
            warmup=50,
            decay=True,
            ema=0.998 if base else 0.995,
        )


def train_autoencoder(autoencoder: nn.Module, pictures: Tensor, seed: int, show: Show, steps: int = 2000) -> None:
    """Train a VQModel on pictures [M, 1, S, S] in [-1, 1]: squared error and commitment loss."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=2e-3)
    for step in range(steps):
        x = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        painted, commitment = autoencoder(x, return_dict=False)
        loss = (painted - x).square().mean() + commitment.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        show(step + 1, steps)
    autoencoder.eval().requires_grad_(False)
