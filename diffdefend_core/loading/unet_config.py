"""The configuration of a UNet2DModel, checked field by field before anything is built from it. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.fields import Fields

MAX_SIDE = 2048
MAX_CHANNELS = 16384
MAX_BLOCKS = 12
MAX_ROWS = 10_000  # of a learned time embedding

DOWN_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
)
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
_DEFAULT_DOWN = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
_DEFAULT_UP = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")


def read_unet_config(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the arguments of UNet2DModel, and nothing else, from its configuration; absent fields get its defaults.

    Raises ModelRejectedError at a field of a wrong type or beyond a limit, and at class-conditional models.
    """
    fields = Fields(file, values)
    _refuse_unsupported(fields)
    channels = fields.integer("in_channels", 3, 1, 64)
    if fields.integer("out_channels", 3, 1, 128) != channels:
        raise fields.wrong("out_channels", f"in_channels, which is {channels}")
    blocks = fields.integers("block_out_channels", (224, 448, 672, 896), MAX_CHANNELS, MAX_BLOCKS)
    return {
        "sample_size": _sample_size(fields, len(blocks)),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": blocks,
        "down_block_types": fields.words("down_block_types", _DEFAULT_DOWN, DOWN_BLOCKS, len(blocks)),
        "up_block_types": fields.words("up_block_types", _DEFAULT_UP, UP_BLOCKS, len(blocks)),
        "layers_per_block": fields.integer("layers_per_block", 2, 1, 16),
        **_time_options(fields),
        **_layer_options(fields),
    }


def _refuse_unsupported(fields: Fields) -> None:
    for key in ("class_embed_type", "num_class_embeds"):
        if fields.values.get(key) is not None:
            raise fields.wrong(key, "null: class-conditional models are not supported")
    if fields.flag("center_input_sample", False):
        raise fields.wrong("center_input_sample", "false: the value range of such a model is not that of its pipeline")
    if "mid_block_type" in fields.values:
        fields.word("mid_block_type", "UNetMidBlock2D", ("UNetMidBlock2D",))


def _sample_size(fields: Fields, blocks: int) -> tuple[int, int]:
    """Return (height, width), which the network halves blocks - 1 times."""
    value = fields.values.get("sample_size")
    sides: list[Any] = value if isinstance(value, list) else [value, value]
    step = 2 ** (blocks - 1)
    if len(sides) != 2 or any(type(side) is not int or not step <= side <= MAX_SIDE or side % step for side in sides):
        raise fields.wrong("sample_size", f"one or two multiples of {step}, at most {MAX_SIDE}")
    return sides[0], sides[1]


def _time_options(fields: Fields) -> dict[str, Any]:
    kind = fields.word("time_embedding_type", "positional", ("positional", "fourier", "learned"))
    rows = _optional_integer(fields, "num_train_timesteps", MAX_ROWS)
    if kind == "learned" and rows is None:
        raise fields.wrong("num_train_timesteps", f"a whole number from 1 to {MAX_ROWS}")
    return {
        "time_embedding_type": kind,
        "time_embedding_dim": _optional_integer(fields, "time_embedding_dim", MAX_CHANNELS),
        "freq_shift": fields.integer("freq_shift", 0, 0, 1),
        "flip_sin_to_cos": fields.flag("flip_sin_to_cos", True),
        "num_train_timesteps": rows,
    }


def _layer_options(fields: Fields) -> dict[str, Any]:
    return {
        "mid_block_scale_factor": fields.number("mid_block_scale_factor", 1, 1e-3, 1e3),
        "downsample_padding": fields.integer("downsample_padding", 1, 0, 1),
        "downsample_type": fields.word("downsample_type", "conv", ("conv", "resnet")),
        "upsample_type": fields.word("upsample_type", "conv", ("conv", "resnet")),
        "dropout": fields.number("dropout", 0.0, 0.0, 0.99),
        "act_fn": fields.word("act_fn", "silu", ("silu", "swish", "mish", "gelu", "relu")),
        "attention_head_dim": _attention_head_dim(fields),
        "norm_num_groups": _optional_integer(fields, "norm_num_groups", 1024, 32),
        "attn_norm_num_groups": _optional_integer(fields, "attn_norm_num_groups", 1024),
        "norm_eps": fields.number("norm_eps", 1e-5, 1e-12, 1.0),
        "resnet_time_scale_shift": fields.word("resnet_time_scale_shift", "default", ("default", "scale_shift")),
        "add_attention": fields.flag("add_attention", True),
    }


def _attention_head_dim(fields: Fields) -> int | None:
    """An explicit null means one head, an absent field means heads of 8 channels."""
    return _optional_integer(fields, "attention_head_dim", 1024, 8)


def _optional_integer(fields: Fields, key: str, high: int, default: int | None = None) -> int | None:
    return fields.integer(key, default, 1, high) if _is_set(fields, key, default) else None


def _is_set(fields: Fields, key: str, default: int | None) -> bool:
    return fields.values.get(key, default) is not None


def shape_of(arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the samples of the network with these checked arguments."""
    height, width = arguments["sample_size"]
    if arguments["in_channels"] * height * width > MAX_SIDE * MAX_SIDE:
        raise ModelRejectedError(
            f"samples of {arguments['in_channels']} x {height} x {width}",
            expected=f"at most {MAX_SIDE * MAX_SIDE} numbers per sample",
            action="this model is too large for a pixel model",
        )
    return arguments["in_channels"], height, width


def check_told(arguments: dict[str, Any], told: NDArray[Any], file: str) -> None:
    """Raise ModelRejectedError unless the time embedding can take `told` [T], what the network is told at each level.

    A learned embedding is a table of whole numbers; a Fourier embedding takes the logarithm.
    """
    kind, rows = arguments["time_embedding_type"], arguments["num_train_timesteps"]
    if kind == "learned" and not (np.issubdtype(told.dtype, np.integer) and told.max() < rows):
        expected = f"levels 0 to {rows - 1}, which its learned embedding has rows for"
    elif kind == "fourier" and not told.min() > 0:
        expected = "positive numbers, of which a Fourier embedding takes the logarithm"
    else:
        return
    raise ModelRejectedError(
        f"the network of {file} is told {told.min():.4g} to {told.max():.4g}",
        expected=expected,
        action="this model is not supported; check that network and scheduler belong together",
    )
