"""Reading JSON files that nobody vouches for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffdefend_core.errors import ModelRejectedError

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
CODE_KEYS = frozenset(
    ("auto_map", "custom_pipeline", "custom_pipelines", "custom_code", "trust_remote_code", "quantization_config")
)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder. Raises ModelRejectedError if it is not a plain one.

    Refused are files above 1 MB, nesting above 16 levels, doubled keys, numbers that are not finite, and at any depth
    keys by which libraries choose other code to run.
    """
    if path.stat().st_size > MAX_BYTES:
        raise _rejected(f"{path.name} has {path.stat().st_size} bytes", f"at most {MAX_BYTES} bytes of JSON")
    value = parse_json_object(path.read_bytes(), path.name)
    found = _code_key(value)
    if found:
        raise _rejected(f"{path.name} has the key {found}, which selects code to run", "a plain configuration")
    return value


def parse_json_object(text: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `text`, which `name` names in errors. Raises ModelRejectedError."""
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise _rejected(f"{name} is not valid JSON ({str(error)[:80] or 'nested too deeply'})", "valid JSON") from error
    if not isinstance(value, dict):
        raise _rejected(f"{name} holds a {type(value).__name__}", "a JSON object")
    if not _is_shallow(value, MAX_DEPTH):
        raise _rejected(f"{name} is nested more than {MAX_DEPTH} levels deep", "a plain configuration")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they believe."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text[:20])


def _code_key(value: object) -> str:
    """Return the first of CODE_KEYS that is a key anywhere in the value, or nothing."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = min(CODE_KEYS.intersection(value), default="") if isinstance(value, dict) else ""
    return found or next(filter(None, map(_code_key, children)), "")


def _is_shallow(value: object, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_is_shallow(child, depth - 1) for child in children)


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(found, expected=expected, action="do not load this model; ask where it came from")
