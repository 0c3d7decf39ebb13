"""Typed access to the fields of a configuration that nobody vouches for; each refusal names file and field."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdefend_core.errors import ModelRejectedError


@dataclass(frozen=True)
class Fields:
    """The fields of one file. Each method returns a field, or its default if absent, and raises ModelRejectedError.

    An explicit null is not an absent field: diffusers would act on it.
    """

    file: str
    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        """Return a whole number in [low, high]."""
        value = self.values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Return a number in [low, high]."""
        value = self.values.get(key, default)
        if not is_number(value) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low} to {high}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def word(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """Return one of the allowed words."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(key, "one of " + ", ".join(allowed))
        return value

    def items(self, key: str, default: Sequence[Any], high: int) -> list[Any]:
        """Return a list of 1 to `high` items."""
        value = self.values.get(key, list(default))
        if not isinstance(value, list) or not 1 <= len(value) <= high:
            raise self.wrong(key, f"a list of 1 to {high} items")
        return value

    def integers(self, key: str, default: Sequence[int], high: int, most: int) -> tuple[int, ...]:
        """Return 1 to `most` whole numbers in [1, high]."""
        sizes = self.items(key, default, most)
        if not all(type(size) is int and 1 <= size <= high for size in sizes):
            raise self.wrong(key, f"whole numbers from 1 to {high}")
        return tuple(sizes)

    def words(self, key: str, default: Sequence[str], allowed: Sequence[str], count: int) -> tuple[str, ...]:
        """Return `count` of the allowed words."""
        words = self.items(key, default, max(count, len(default)))
        if len(words) != count or not all(isinstance(word, str) and word in allowed for word in words):
            raise self.wrong(key, f"{count} of {', '.join(allowed)}")
        return tuple(words)

    def wrong(self, key: str, expected: str) -> ModelRejectedError:
        """Return the error for a field that is not as `expected`."""
        return ModelRejectedError(
            f"{key} in {self.file} is {str(self.values.get(key))[:80]!r}",
            expected=expected,
            action="this model is not supported; see the list of families",
        )


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number that a float can hold, and not a truth value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # a whole number beyond the range of floats would raise in `isfinite`
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max
