"""Laws of the strict readers: they raise nothing but refusals, and accept nothing that the reference reader rejects."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.autoencoder_config import read_kl_config, read_vq_config
from diffdefend_core.loading.fields import is_number
from diffdefend_core.loading.formats import check_name
from diffdefend_core.loading.json_file import parse_json_object
from diffdefend_core.loading.safetensors_header import read_header
from diffdefend_core.loading.schedule import SCHEDULERS, read_schedule
from diffdefend_core.loading.unet_config import read_unet_config

FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
COUNTS = st.one_of(st.integers(0, 64), st.sampled_from([-1, 2**31, 2**53, 2**63, 2**64]), st.floats(), st.booleans())
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "X", 1]),
        "shape": st.lists(COUNTS, max_size=3),
        "data_offsets": st.lists(COUNTS, min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(st.text(max_size=8), st.one_of(ENTRY, st.integers(), st.none()), max_size=3)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=9)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
)
UNET_KEYS = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
    "layers_per_block", "time_embedding_type", "time_embedding_dim", "num_train_timesteps", "norm_eps", "act_fn",
    "dropout", "attention_head_dim", "norm_num_groups", "latent_channels", "scaling_factor", "num_vq_embeddings",
    "vq_embed_dim",
)  # fmt: skip
SCHEDULE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "sigma_min",
    "sigma_max", "sigma_data", "rho", "shift", "rescale_betas_zero_snr", "invert_sigmas",
)  # fmt: skip


def in_a_file(content: bytes) -> Path:
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
        file.write(content)
    return Path(file.name)


def tensors_or_none(path: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        return {name: info.shape for name, info in read_header(path).items()}
    except ModelRejectedError:
        return None


def theirs_or_none(path: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def agrees(content: bytes) -> bool:
    """Return whether ours is None or equal to theirs."""
    path = in_a_file(content)
    try:
        ours = tensors_or_none(path)
        return ours is None or ours == theirs_or_none(path)
    finally:
        path.unlink()


@FEW
@given(HEADERS, st.integers(0, 80))
def test_no_header_is_accepted_that_safetensors_rejects_or_reads_differently(header: Any, size: int) -> None:
    text = json.dumps(header).encode()
    assert agrees(struct.pack("<Q", len(text)) + text + bytes(size))


@FEW
@given(
    st.lists(
        st.tuples(st.sampled_from([("F32", 4), ("F16", 2), ("F64", 8)]), st.integers(1, 5)), min_size=1, max_size=4
    )
)
def test_every_well_formed_file_is_accepted_by_both(parts: list[tuple[tuple[str, int], int]]) -> None:
    header, place = {}, 0
    for number, ((dtype, width), count) in enumerate(parts):
        header[f"t{number}"] = {"dtype": dtype, "shape": [count], "data_offsets": [place, place + width * count]}
        place += width * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = in_a_file(struct.pack("<Q", len(text)) + text + bytes(place))
    try:
        ours = tensors_or_none(path)
        assert ours is not None and ours == theirs_or_none(path)
    finally:
        path.unlink()


@FEW
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_raise_anything_else(content: bytes) -> None:
    assert agrees(content)


@FEW
@given(JSON)
def test_json_that_is_accepted_means_what_it_says(value: Any) -> None:
    text = json.dumps(value, allow_nan=True)
    with contextlib.suppress(ModelRejectedError):
        assert parse_json_object(text.encode("utf-8", "surrogatepass"), "x") == json.loads(text)


@FEW
@given(st.dictionaries(st.sampled_from(UNET_KEYS), JSON, max_size=4))
def test_no_field_of_a_network_makes_its_reader_raise_anything_else(values: dict[str, Any]) -> None:
    for read in (read_unet_config, read_vq_config, read_kl_config):
        try:
            read(values, "config.json")
        except ModelRejectedError as error:
            assert "config.json" in str(error)


@FEW
@given(st.sampled_from(sorted(SCHEDULERS)), st.dictionaries(st.sampled_from(SCHEDULE_KEYS), JSON, max_size=3))
def test_no_field_of_a_schedule_makes_its_reader_raise_anything_else(kind: str, values: dict[str, Any]) -> None:
    try:
        assert len(read_schedule(kind, values, "scheduler.json").sigma) >= 1
    except ModelRejectedError as error:
        assert "scheduler.json" in str(error)


@FEW
@given(st.text(max_size=30))
def test_an_accepted_file_name_is_plain(name: str) -> None:
    for accepted in (name, f"{name}.json", f"unet/{name}.json"):
        try:
            check_name(accepted)
        except ModelRejectedError:
            continue
        assert accepted.isascii() and accepted.isprintable() and ".." not in accepted.split("/")
        assert not set(accepted) & set("<>&\"'\\$`{}|;:*?~!")


def test_a_whole_number_beyond_floats_is_no_number() -> None:
    assert not is_number(10**400) and not is_number(-(10**400)) and is_number(10**300) and not is_number(True)
