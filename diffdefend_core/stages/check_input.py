"""Check initial noise before a model paints it: what `diffdefend check-input` does. It writes nothing of its own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from diffdefend_core.config import Settings
from diffdefend_core.detection.guard import Guard, noise_tests
from diffdefend_core.detection.statistics import painting_steps
from diffdefend_core.detection.ufid import Query, ufid
from diffdefend_core.diffusion.samplers import find, usual
from diffdefend_core.errors import InputError, numpy_reason
from diffdefend_core.io.store import local_path, open_store, to_uri
from diffdefend_core.progress import Progress, silent
from diffdefend_core.provenance import code_version
from diffdefend_core.report.text import number
from diffdefend_core.stages.invert_trigger import read_best
from diffdefend_core.stages.load import load
from diffdefend_core.stages.model import fetch_denoiser, refusing_overflow

SCHEMA_VERSION = "1.0"
MAX_BYTES = 1 << 30
TENSORS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check says of N rows: flags [N], scores [N] and p-values [N] by name, and the threshold of the check.

    A row is flagged above the threshold of a score; a check of p-values alone flags at or below it.
    """

    name: str
    threshold: float
    flags: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    p_values: Mapping[str, Tensor] = field(default_factory=dict)
    forward_equivalents: int = 0


def check_input(
    noise_uri: str,
    *,
    settings: Settings,
    false_positive_rate: float,
    trigger_uri: str = "",
    model_uri: str = "",
    sampler: str = "",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Return a document of plain JSON values: each row's scores, p-values and flag.

    `noise_uri` is a .npy file, or a safetensors file with `noise`: [C, H, W] or [N, C, H, W] in units of the initial
    noise. `trigger_uri` is a safetensors file with `trigger` and perhaps `gamma`, or a folder of invert-trigger; if it
    is empty the noise itself is tested. With `model_uri`, as a scan takes it, UFID asks the model by `sampler`, its
    usual one if that is empty. Each check holds the rate by itself. Raises InputError for what cannot be read or does
    not fit together, and as the load stage does.
    """
    if sampler and not model_uri:
        raise InputError(
            f"sampler {sampler} without a model", expected="a model that paints with it", action="give --model too"
        )
    noise = _noise(noise_uri)
    checks = _trigger_checks(noise, trigger_uri, false_positive_rate) if trigger_uri else []
    if not trigger_uri:
        checks.append(_noise_check(noise, false_positive_rate))
    if model_uri:
        checks.append(_similarity(noise, model_uri, sampler, false_positive_rate, settings, progress or silent))
    return _document(noise_uri, noise, checks, false_positive_rate)


def table_rows(document: Mapping[str, object]) -> list[dict[str, str]]:
    """Return the rows of a document of `check_input` as texts by column."""
    rows = document["rows"]
    assert isinstance(rows, list)
    return [
        {
            "row": str(row["row"]),
            **{name: number(value) for name, value in row["scores"].items()},
            **{f"p_{name}": number(value) for name, value in row["p_values"].items()},
            "flag": ", ".join(row["flagged_by"]) or "no",
        }
        for row in rows
    ]


def _trigger_checks(noise: Tensor, trigger_uri: str, rate: float) -> list[Check]:
    """Return the matched filter and, if the file has a `gamma`, the likelihood ratio."""
    trigger, gamma = _trigger(trigger_uri)
    filtered = Guard.matched(trigger, rate)
    scores, flags = filtered(noise)
    tail = torch.special.erfc(scores.double() / 2**0.5) / 2
    checks = [
        Check(
            name="matched_filter",
            threshold=filtered.threshold,
            flags=flags,
            scores={"matched_filter": scores},
            p_values={"matched_filter": tail},
        )
    ]
    if gamma is not None:
        ratio = Guard.likelihood(trigger, gamma, rate)
        scores, flags = ratio(noise)
        checks.append(
            Check(
                name="likelihood_ratio",
                threshold=ratio.threshold,
                flags=flags,
                scores={"likelihood_ratio": scores},
            )
        )
    return checks


def _noise_check(noise: Tensor, rate: float) -> Check:
    tests = noise_tests(noise)
    p_values = {"mean": tests.mean, "norm": tests.norm, "distribution": tests.distribution, "combined": tests.combined}
    return Check(name="noise_tests", threshold=rate, flags=tests.combined <= rate, p_values=p_values)


def _similarity(
    noise: Tensor, model_uri: str, sampler: str, rate: float, settings: Settings, progress: Progress
) -> Check:
    chosen = find(sampler) if sampler else None
    denoiser = fetch_denoiser(load(model_uri, settings=settings), settings.device, settings.adapter)
    if noise.shape[1:] != denoiser.shape:
        raise InputError(
            f"noise of shape {tuple(noise.shape[1:])}",
            expected=f"{denoiser.shape}, the shape of the model's initial noise",
            action="give the noise that this model starts from",
        )
    entry = chosen or usual(denoiser)
    query = Query(sampler=entry.name, steps=painting_steps(denoiser, entry, settings.detection))
    with refusing_overflow():
        found = ufid(
            denoiser,
            noise,
            query,
            rate,
            seed=settings.seed,
            progress=lambda done, total: progress("variants", done, total),
        )
    return Check(
        name="ufid",
        threshold=found.threshold,
        flags=found.flags,
        scores={"ufid": found.densities},
        p_values={"ufid": found.p_values},
        forward_equivalents=found.forward_equivalents,
    )


def _document(noise_uri: str, noise: Tensor, checks: list[Check], rate: float) -> dict[str, object]:
    rows = [_row(number, checks) for number in range(len(noise))]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "diffdefend",
        "code_version": code_version(),
        "noise": noise_uri,
        "shape": list(noise.shape[1:]),
        "false_positive_rate": rate,
        "thresholds": {check.name: check.threshold for check in checks},
        "forward_equivalents": sum(check.forward_equivalents for check in checks),
        "rows": rows,
        "flagged": sum(bool(row["flag"]) for row in rows),
    }


def _row(number: int, checks: list[Check]) -> dict[str, object]:
    flagged_by = [check.name for check in checks if bool(check.flags[number])]
    return {
        "row": number,
        "flag": bool(flagged_by),
        "flagged_by": flagged_by,
        "scores": {name: _plain(values[number]) for check in checks for name, values in check.scores.items()},
        "p_values": {name: _plain(values[number]) for check in checks for name, values in check.p_values.items()},
    }


def _plain(value: Tensor) -> float | None:
    plain = value.item()
    return plain if math.isfinite(plain) else None


def _noise(uri: str) -> Tensor:
    """Return the noise [N, C, H, W] in float32. Raises InputError for anything else in the file."""
    content = _read_bytes(uri)
    try:
        noise = load_tensors(content)["noise"] if uri.endswith(TENSORS) else _array(content)
    except (SafetensorError, KeyError, ValueError, EOFError, OSError) as error:
        raise InputError(
            f"noise {uri} cannot be read ({numpy_reason(error)})",
            expected="a .npy file of floating-point numbers, or a safetensors file with `noise`",
            action="write it with numpy.save",
        ) from error
    rows = noise.float()
    if rows.ndim == 3:
        rows = rows[None]
    if not noise.is_floating_point() or rows.ndim != 4 or not rows.numel() or not bool(rows.isfinite().all()):
        state = "" if bool(rows.isfinite().all()) else ", not finite"
        raise InputError(
            f"noise of shape {tuple(noise.shape)} and type {str(noise.dtype).removeprefix('torch.')}{state} in {uri}",
            expected="finite floating-point numbers, [C, H, W] or [N, C, H, W]",
            action="give the initial noise as it was drawn",
        )
    return rows


def _array(content: bytes) -> Tensor:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"it holds {getattr(array, 'dtype', 'an archive')}")
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return torch.from_numpy(array.astype(np.float32))


def _trigger(uri: str) -> tuple[Tensor, Tensor | None]:
    """Return trigger [C, H, W] and gamma, if there is one, of a file, or the best candidate of a folder."""
    if not uri.endswith(TENSORS):
        return read_best(to_uri(uri)), None
    try:
        tensors = load_tensors(_read_bytes(uri))
        return tensors["trigger"], tensors.get("gamma")
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"trigger {uri} cannot be read ({error})",
            expected="a safetensors file with `trigger`, or a folder of invert-trigger",
            action="give such a file, or the folder itself",
        ) from error


def _read_bytes(uri: str) -> bytes:
    """Return the file at a URI or path. Raises StoreError if it is absent, InputError above 1 GiB."""
    local = local_path(to_uri(uri))
    folder, _, name = (to_uri(local.parent), "", local.name) if local else uri.rpartition("/")
    store, prefix = open_store(f"{folder}/")
    content = bytearray()
    for chunk in store.read(f"{prefix}{name}"):
        content += chunk
        if len(content) > MAX_BYTES:
            raise InputError(f"{uri} has more than 1 GiB", expected="one batch of noise", action="split it")
    return bytes(content)
