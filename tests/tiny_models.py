"""Tiny real pipelines of diffusers, one of every family."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    VQModel,
)

STEPS = 100
# the linear schedule of DDPM at a tenth of its steps: the same noise at the last level
BETAS = {"num_train_timesteps": STEPS, "beta_start": 0.001, "beta_end": 0.2}


def tiny_unet(**options: object) -> UNet2DModel:
    """Return a UNet2DModel of 8x8 images with random weights."""
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**arguments, **options}).eval()


def tiny_autoencoder(kind: type[Any] = VQModel, **options: object) -> Any:
    """Return a VQModel or AutoencoderKL between 16x16 pictures and 8x8 latents of 3 channels, with random weights."""
    torch.manual_seed(1)
    arguments = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
        **({"num_vq_embeddings": 16} if kind is VQModel else {}),
    }
    return kind(**{**arguments, **options}).eval()


def tiny_pipeline(family: str, *, unet: UNet2DModel | None = None, vqvae: Any = None) -> DiffusionPipeline:
    """Return a pipeline of diffusers of a family with few levels; parts that are not given are the tiny ones."""
    fourier = {"time_embedding_type": "fourier"} if family == "ncsn" else {}
    network = unet or tiny_unet(**fourier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of these pipelines are called deprecated
        if family == "ncsn":
            from diffusers.pipelines.deprecated.score_sde_ve import ScoreSdeVePipeline

            return ScoreSdeVePipeline(network, ScoreSdeVeScheduler(num_train_timesteps=STEPS, sigma_max=50.0))
        if family == "flow":
            return DDPMPipeline(network, FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=3.0))
        if family == "consistency":
            return ConsistencyModelPipeline(network, CMStochasticIterativeScheduler(sigma_data=0.7))
        if family == "ldm":
            from diffusers.pipelines.deprecated.latent_diffusion_uncond import LDMPipeline

            return LDMPipeline(vqvae or tiny_autoencoder(), network, DDPMScheduler(**BETAS))
        return DDPMPipeline(network, DDPMScheduler(**BETAS))


def save_tiny_pipeline(folder: Path, family: str = "ddpm") -> None:
    """Let diffusers save a pipeline of a family, by default a DDPM of 100 steps."""
    tiny_pipeline(family).save_pretrained(folder)
