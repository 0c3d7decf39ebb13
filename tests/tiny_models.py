"""Tiny real pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


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


def save_tiny_pipeline(folder: Path) -> None:
    """Let diffusers save a DDPM pipeline of 50 steps."""
    DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
