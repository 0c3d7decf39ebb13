"""Reading and writing frozen dataclasses as JSON, with errors that name the path of what is wrong.

Standard library only. Supported field types: str, int, float, bool, None unions, tuple[X, ...], dict[str, X],
string enums and nested records. Numbers must be finite: a NaN in a decision is an error, never a value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from enum import Enum
from typing import Any, Self

from diffdefend_core.errors import ArtifactError

MAX_DEPTH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A frozen record with a version; `to_json` and `from_json` are each other's inverse.

    A newer major version is refused, a newer minor one is read: fields it added are ignored.
    """

    schema_version: str = "1.0"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain

    def to_json(self) -> str:
        """Return the record as JSON with sorted keys. Raises ArtifactError at a number that is not finite."""
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise ArtifactError(
                f"{type(self).__name__} holds a number that is not finite",
                expected="finite numbers",
                action="rerun the stage with another seed",
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record. Raises ArtifactError that names the dotted path of the first mistake."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{cls.__name__} is not valid JSON ({error})",
                expected="a JSON object",
                action="restore the artifact or rerun its stage",
            ) from error
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """Read a record from plain JSON values. Raises ArtifactError as `from_json` does."""
        return _read(cls, value, cls.__name__, 0)  # type: ignore[no-any-return]


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _wrong(path: str, value: object, expected: str) -> ArtifactError:
    shown = json.dumps(value, default=str)
    return ArtifactError(f"{path} is {shown[:80]}", expected=expected, action="restore the artifact or rerun its stage")


def _read(kind: Any, value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _wrong(path, "nested too deeply", f"at most {MAX_DEPTH} levels")
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_optional(kind, value, path, depth)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(path, value, "a list")
        item_kind = typing.get_args(kind)[0]
        return tuple(_read(item_kind, item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, value, "an object")
        item_kind = typing.get_args(kind)[1]
        return {key: _read(item_kind, item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if issubclass(kind, Record):
        return _read_record(kind, value, path, depth)
    return _read_scalar(kind, value, path)


def _read_optional(kind: Any, value: Any, path: str, depth: int) -> Any:
    inner = [option for option in typing.get_args(kind) if option is not types.NoneType]
    return None if value is None else _read(inner[0], value, path, depth)


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if issubclass(kind, Enum):
        words = [member.value for member in kind]
        if value not in words:
            raise _wrong(path, value, "one of " + ", ".join(words))
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise _wrong(path, value, f"a {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise _wrong(path, str(value), "a finite number")
    return value


def _read_record(kind: Any, value: Any, path: str, depth: int) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, value, "an object")
    hints = typing.get_type_hints(kind)
    _check_version(kind, value.get("schema_version", "1.0"), path)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given[field.name] = _read(hints[field.name], value[field.name], f"{path}.{field.name}", depth + 1)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _wrong(f"{path}.{field.name}", "missing", "a value")
    return kind(**given)


def _check_version(kind: Any, version: object, path: str) -> None:
    known = str(kind.schema_version).partition(".")[0]
    major = str(version).partition(".")[0]
    if not major.isdigit() or int(major) > int(known):
        raise ArtifactError(
            f"{path}.schema_version is {str(version)[:40]!r}",
            expected=f"major version {known} or older",
            action="upgrade DiffDefend to read it",
        )
