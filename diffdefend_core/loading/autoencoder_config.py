"""The configurations of VQModel and AutoencoderKL, checked field by field before anything is built. No torch."""

from __future__ import annotations

from typing import Any

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.fields import Fields
from diffdefend_core.loading.unet_config import MAX_BLOCKS, MAX_CHANNELS, MAX_SIDE

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
# what a file without the field means; diffusers would divide by its own default of 0.18215
NO_SCALING = 1.0


def read_vq_config(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the arguments of VQModel, and nothing else, from its configuration; absent fields get its defaults.

    The one exception is `scaling_factor`, which is 1 if absent. Raises ModelRejectedError at a field of a wrong type
    or beyond a limit.
    """
    fields = Fields(file, values)
    return {
        **_shared(fields, latent_channels=3),
        "num_vq_embeddings": fields.integer("num_vq_embeddings", 256, 1, 1 << 20),
        "vq_embed_dim": None if values.get("vq_embed_dim") is None else fields.integer("vq_embed_dim", None, 1, 1024),
        "norm_type": fields.word("norm_type", "group", ("group",)),
    }


def read_kl_config(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL, as `read_vq_config` does for VQModel."""
    fields = Fields(file, values)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if values.get(key) is not None:
            raise fields.wrong(key, "null: LDMPipeline does not shift its latents")
    return {
        **_shared(fields, latent_channels=4),
        "use_quant_conv": fields.flag("use_quant_conv", True),
        "use_post_quant_conv": fields.flag("use_post_quant_conv", True),
    }


def _shared(fields: Fields, latent_channels: int) -> dict[str, Any]:
    channels = fields.integer("in_channels", 3, 1, 64)
    if fields.integer("out_channels", 3, 1, 64) != channels:
        raise fields.wrong("out_channels", f"in_channels, which is {channels}")
    blocks = fields.integers("block_out_channels", (64,), MAX_CHANNELS, MAX_BLOCKS)
    return {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": blocks,
        "down_block_types": fields.words("down_block_types", DOWN_BLOCKS[:1], DOWN_BLOCKS, len(blocks)),
        "up_block_types": fields.words("up_block_types", UP_BLOCKS[:1], UP_BLOCKS, len(blocks)),
        "layers_per_block": fields.integer("layers_per_block", 1, 1, 16),
        "act_fn": fields.word("act_fn", "silu", ("silu", "swish", "mish", "gelu", "relu")),
        "latent_channels": fields.integer("latent_channels", latent_channels, 1, 1024),
        "norm_num_groups": fields.integer("norm_num_groups", 32, 1, 1024),
        "mid_block_add_attention": fields.flag("mid_block_add_attention", True),
        "scaling_factor": fields.number("scaling_factor", NO_SCALING, 1e-6, 1e6),
    }


def picture_shape_of(arguments: dict[str, Any], latents: tuple[int, int, int], file: str) -> tuple[int, int, int]:
    """Return (C, H, W) of the pictures that a decoder with these checked arguments makes of `latents` (C, H, W).

    Every block but the last doubles the sides. Raises ModelRejectedError when the latents do not fit the decoder.
    """
    wanted = arguments.get("vq_embed_dim") or arguments["latent_channels"]
    if latents[0] != wanted:
        raise _rejected(f"the network has latents of {latents[0]} channels", f"{wanted}, as {file} says")
    factor = 2 ** (len(arguments["block_out_channels"]) - 1)
    channels, height, width = arguments["out_channels"], latents[1] * factor, latents[2] * factor
    if channels * height * width > MAX_SIDE * MAX_SIDE:
        raise _rejected(f"pictures of {channels} x {height} x {width}", f"at most {MAX_SIDE * MAX_SIDE} numbers each")
    return channels, height, width


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(
        found, expected=expected, action="this model is not supported; check that network and decoder belong together"
    )
