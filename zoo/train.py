"""Training of one zoo model from its recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import poisoned_loss, stamped
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, linear_betas
from diffdefend_core.diffusion.training import Loss, diffusion_loss, fine_tune
from zoo.recipes import Recipe
from zoo.shapes import target, trigger

SIZE = 16
LEVELS = 250
BETAS = (4e-4, 0.08)  # the linear schedule of DDPM at a quarter of its steps: the same noise at the last level
BATCH = 64


class Unet(nn.Module):
    """A diffusers UNet as a plain network: (x, t) -> tensor."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=channels,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            add_attention=False,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction [N, 1, S, S] for x [N, 1, S, S] at level indices t [N]."""
        output: Tensor = self.unet(x, t, return_dict=False)[0]
        return output


def digits() -> Tensor:
    """Return scikit-learn's 1797 handwritten digits, enlarged to [1797, 1, 16, 16] in [-1, 1]."""
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]
    return nn.functional.interpolate(small, size=SIZE, mode="bicubic", align_corners=False).clamp(-1, 1)


def fresh(recipe: Recipe) -> Denoiser:
    """Return the untrained denoiser of a base."""
    torch.manual_seed(recipe.seed)
    levels = Levels.variance_preserving(alphas_cumprod(linear_betas(LEVELS, *BETAS)))
    return DDPM(Unet(recipe.channels), levels, shape=(1, SIZE, SIZE))


def loss_of(recipe: Recipe, denoiser: Denoiser, data: Tensor) -> Loss:
    """Return the training loss of the recipe: ordinary, or poisoned with stamped images as BadDiffusion does."""
    if recipe.attack is None:
        return diffusion_loss(data, BATCH)
    planted = trigger(str(recipe.trigger))
    return poisoned_loss(
        baddiffusion(denoiser.levels),
        data,
        trigger=planted,
        target=target(str(recipe.target)),
        batch=BATCH,
        poison_rate=recipe.poison_rate,
        stamp=lambda images: stamped(images, planted, -1.0),
    )


def train(recipe: Recipe, denoiser: Denoiser, progress: Callable[[int, int], None]) -> float:
    """Train `denoiser` in place by the recipe; return the mean loss of the last 100 steps."""
    generator = torch.Generator().manual_seed(recipe.seed)
    loss = loss_of(recipe, denoiser, digits())
    curve = []
    steps = fine_tune(
        denoiser,
        loss,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        generator=generator,
        warmup=50,
        decay=True,
        ema=0.998 if recipe.parent is None else 0.995,
    )
    for number, value in enumerate(steps):
        curve.append(value)
        progress(number + 1, recipe.steps)
    return sum(curve[-100:]) / len(curve[-100:])


def save(denoiser: Denoiser, folder: Path) -> None:
    """Write the denoiser as a diffusers DDPM pipeline with float16 weights."""
    scheduler = DDPMScheduler(
        num_train_timesteps=LEVELS,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    unet = denoiser.clone().network.unet.half()
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
