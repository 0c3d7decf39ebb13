"""Adapters: installed code that turns a folder of weights of any layout into a Denoiser. No torch.

An adapter is a function `(folder: Path, device: str) -> Denoiser`. It is named by the settings only, never by a model
or an artifact: either as an entry point of GROUP, or as `package.module:function`. Its code is trusted, the folder is
not. Whatever goes wrong in it becomes an InputError of one line.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from diffdefend_core.errors import InputError

GROUP = "diffdefend.denoisers"
CONTRACT = "a function (folder: Path, device: str) -> Denoiser"

Adapter = Callable[[Path, str], Any]


def installed() -> list[str]:
    """Return the names of the adapters that are installed as entry points."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_adapter(name: str) -> Adapter:
    """Return the adapter called `name`. Raises InputError when there is none or it cannot be imported."""
    if ":" not in name:
        entries = set(entry_points(group=GROUP, name=name))
        if len(entries) != 1:
            raise InputError(
                f"{len(entries)} installed packages offer an adapter {name!r}",
                expected=f"one of {', '.join(installed()) or '(none is installed)'}, or package.module:function",
                action=f"install the package with the entry point in {GROUP!r}, or mend its name",
            )
        with blaming(name, "cannot be imported"):
            found = entries.pop().load()
    else:
        module, _, path = name.partition(":")
        with blaming(name, "cannot be imported"):
            found = reduce(getattr, path.split("."), importlib.import_module(module))
    if not callable(found):
        raise broken(name, f"is an object of type {type(found).__name__}", CONTRACT)
    return found  # type: ignore[no-any-return]


def call_adapter(name: str, folder: Path, device: str) -> Any:
    """Return what the adapter makes of a folder. Raises InputError when it cannot be found or raises."""
    adapter = find_adapter(name)
    with blaming(name, "failed on the model"):
        return adapter(folder, device)


def describe(name: str, denoiser: Any) -> tuple[str, tuple[int, int, int]]:
    """Return family and shape (C, H, W) of what an adapter returned. Raises InputError unless it has both."""
    family, shape = getattr(denoiser, "family", None), getattr(denoiser, "shape", None)
    if not isinstance(family, str) or not family:
        raise broken(
            name,
            f"returned an object of type {type(denoiser).__name__} with the family {family!r}",
            "a Denoiser with a family",
        )
    sides = tuple(shape) if isinstance(shape, tuple | list) else ()
    if len(sides) != 3 or not all(type(side) is int and side > 0 for side in sides):
        raise broken(name, f"returned a Denoiser of shape {shape!r}", "three positive whole numbers (C, H, W)")
    return family, (sides[0], sides[1], sides[2])


def origin(name: str) -> str:
    """Return the module of an adapter with the start of its sha256: changed code must not reuse old results."""
    module = getattr(find_adapter(name), "__module__", None) or "unknown"
    file = getattr(sys.modules.get(module), "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file and Path(file).is_file() else "unknown"
    return f"{module}, sha256 {digest}"


@contextmanager
def blaming(name: str, what: str) -> Iterator[None]:
    """Turn whatever the foreign code inside raises into an InputError that names the adapter and the error's type."""
    try:
        yield
    # Foreign code may raise anything, even an exit with code 0, and the user needs to know whose fault it is.
    except (Exception, SystemExit) as error:
        first = next(iter(str(error).strip().splitlines()), "no message")[:200]
        raise broken(name, f"{what}: {type(error).__name__}: {first}", CONTRACT) from error


def broken(name: str, found: str, expected: str) -> InputError:
    """Return the error for an adapter that does not keep the contract."""
    return InputError(f"the adapter {name} {found}", expected=expected, action="mend the adapter, or name another one")
