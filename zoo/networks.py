"""Untrained models of every family at the size of the zoo, and how each is written as a diffusers pipeline."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated import LDMPipeline, ScoreSdeVePipeline
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.consistency import ConsistencyModel
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.families.flow import RectifiedFlow
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.diffusion.families.ncsn import NCSN
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod, geometric_sigmas, karras_sigmas, linear_betas
from diffdefend_core.loading.schedule import squared_cosine_betas
from zoo.recipes import Recipe

SIGMAS = (0.01, 50.0)
FLOW_LEVELS = 1000
EDM_LEVELS, EDM_SIGMAS = 80, (0.002, 80.0)
LATENT_CHANNELS, CODES = 3, 256


class Unet(nn.Module):
    """A diffusers UNet as a plain network of level indices; `told` [T] is what it is told at each level."""

    def __init__(self, unet: UNet2DModel, told: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("told", told.float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the output [N, C, S, S] for x [N, C, S, S] at level indices t [N]."""
        output: Tensor = self.unet(x, self.told[t], return_dict=False)[0]
        return output


class Quantised(nn.Module):
    """A VQModel between pictures and latents."""

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents before quantisation."""
        latents: Tensor = self.model.encode(pictures).latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of the nearest codes."""
        pictures: Tensor = self.model.decode(latents).sample
        return pictures


@dataclass(frozen=True)
class Model:
    """A denoiser with its UNet and, for a latent one, its autoencoder."""

    denoiser: Denoiser
    unet: UNet2DModel
    autoencoder: VQModel | None = None

    def to(self, device: str) -> Model:
        """Move the model to a device; return it."""
        for part in (self.unet, self.denoiser.network, self.autoencoder):
            if part is not None:
                part.to(device)
        return self

    def scale_latents(self, pictures: Tensor) -> None:
        """Set the scaling factor so that the latents of `pictures` have unit variance, as a VP model expects."""
        factor = round(1 / self.denoiser.autoencoder.encode(pictures).std().item(), 4)
        self.autoencoder.register_to_config(scaling_factor=factor)
        self.denoiser.scaling_factor = factor


def unet(design: Recipe, size: int, *, pictures: int = 1, embedding: str = "positional") -> UNet2DModel:
    """Return a small untrained UNet2DModel; one with attention has it at its coarsest resolution."""
    plain = len(design.channels) - design.attention
    return UNet2DModel(
        sample_size=size,
        in_channels=pictures,
        out_channels=pictures,
        layers_per_block=1,
        block_out_channels=design.channels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * design.attention,
        up_block_types=("AttnUpBlock2D",) * design.attention + ("UpBlock2D",) * plain,
        add_attention=design.attention,
        attention_head_dim=8,
        time_embedding_type=embedding,
    )


def vector_quantiser(size: int) -> VQModel:
    """Return an untrained autoencoder that halves the side of a picture."""
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        vq_embed_dim=LATENT_CHANNELS,
        num_vq_embeddings=CODES,
        norm_num_groups=4,
        sample_size=size,
        scaling_factor=1.0,
    )


def betas(design: Recipe) -> tuple[float, float]:
    """Return the ends of the linear schedule of DDPM, with the same noise at the last of fewer levels."""
    return 1e-4 * 1000 / design.levels, 0.02 * 1000 / design.levels


def untrained(design: Recipe, size: int, seed: int) -> Model:
    """Return an untrained model of a design for pictures [1, S, S]."""
    torch.manual_seed(seed)
    family = design.family
    drawn = torch.from_numpy(squared_cosine_betas(design.levels)) if design.cosine else None
    vp = Levels.variance_preserving(
        alphas_cumprod(linear_betas(design.levels, *betas(design)) if drawn is None else drawn)
    )
    steps = torch.arange(design.levels)
    shape = (1, size, size)
    if family == "ncsn":
        levels = Levels.variance_exploding(geometric_sigmas(design.levels, *SIGMAS))
        network = unet(design, size, embedding="fourier")
        return Model(NCSN(Unet(network, levels.sigma), levels, shape=shape), network)
    if family == "flow":
        levels = Levels.rectified_flow((torch.arange(FLOW_LEVELS) + 1) / FLOW_LEVELS)
        network = unet(design, size)
        return Model(RectifiedFlow(Unet(network, levels.sigma * FLOW_LEVELS), levels, shape=shape), network)
    if family == "consistency":
        levels = Levels.variance_exploding(karras_sigmas(EDM_LEVELS, *EDM_SIGMAS))
        network = unet(design, size)
        return Model(ConsistencyModel(Unet(network, 250 * levels.sigma.log()), levels, shape=shape), network)
    if family == "ldm":
        autoencoder = vector_quantiser(size)
        latents = (LATENT_CHANNELS, size // 2, size // 2)
        network = unet(design, size // 2, pictures=LATENT_CHANNELS)
        denoiser = LatentDiffusion(
            Unet(network, steps), vp, Quantised(autoencoder), shape=latents, picture_shape=shape, scaling_factor=1.0,
            prediction=design.prediction,
        )  # fmt: skip
        return Model(denoiser, network, autoencoder)
    network = unet(design, size)
    return Model(DDPM(Unet(network, steps), vp, shape=shape, prediction=design.prediction), network)


def pipeline(design: Recipe, network: UNet2DModel, autoencoder: VQModel | None) -> DiffusionPipeline:
    """Return the diffusers pipeline of a model."""
    family = design.family
    if family == "ncsn":
        low, high = SIGMAS
        scheduler = ScoreSdeVeScheduler(num_train_timesteps=design.levels, snr=0.075, sigma_min=low, sigma_max=high)
        return ScoreSdeVePipeline(unet=network, scheduler=scheduler)
    if family == "flow":
        return DDPMPipeline(
            unet=network, scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_LEVELS, shift=1.0)
        )
    if family == "consistency":
        low, high = EDM_SIGMAS
        scheduler = CMStochasticIterativeScheduler(
            num_train_timesteps=EDM_LEVELS, sigma_min=low, sigma_max=high, sigma_data=0.5, clip_denoised=False
        )
        return ConsistencyModelPipeline(unet=network, scheduler=scheduler)
    kind = DDIMScheduler if family == "ldm" else DDPMScheduler
    first, last = betas(design)
    scheduler = kind(
        num_train_timesteps=design.levels,
        beta_start=first,
        beta_end=last,
        beta_schedule="squaredcos_cap_v2" if design.cosine else "linear",
        prediction_type=design.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    if family == "ldm":
        return LDMPipeline(vqvae=autoencoder, unet=network, scheduler=scheduler)
    return DDPMPipeline(unet=network, scheduler=scheduler)


def save(design: Recipe, model: Model, folder: Path) -> None:
    """Write a model as a diffusers pipeline with float16 weights."""
    autoencoder = copy.deepcopy(model.autoencoder).half().cpu() if model.autoencoder is not None else None
    pipeline(design, copy.deepcopy(model.unet).half().cpu(), autoencoder).save_pretrained(folder)


def read(design: Recipe, size: int, folder: Path) -> Model:
    """Return a model written by `save`, frozen, in float32."""
    from safetensors.torch import load_file

    model = untrained(design, size, 0)
    for part, name in ((model.unet, "unet"), (model.autoencoder, "vqvae")):
        if part is not None:
            weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
            part.load_state_dict({key: value.float() for key, value in weights.items()})
            part.eval().requires_grad_(False)
    if model.autoencoder is not None:
        factor = json.loads((folder / "vqvae" / "config.json").read_text())["scaling_factor"]
        model.autoencoder.register_to_config(scaling_factor=factor)
        model.denoiser.scaling_factor = factor
    model.denoiser.freeze()
    return model
