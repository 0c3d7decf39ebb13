"""Which files a model folder may hold: an allow-list, with limits. Anything else is refused unread."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from diffdefend_core.errors import InputError, ModelRejectedError

MAX_FILES = 200
MAX_DEPTH = 4
MAX_NAME = 255
MAX_TOTAL_BYTES = 50 * 10**9
SUFFIXES = frozenset((".json", ".safetensors", ".md", ".txt"))
NAMES = frozenset((".gitattributes", "LICENSE"))
TORCH_PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt"))
PICKLES = TORCH_PICKLES | {".pkl", ".pickle"}
# Letters that look alike, control characters and markup have no place in the name of a weights file.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+ -]*")


def list_files(folder: Path, *, pickles: bool = False) -> tuple[Path, ...]:
    """Return the files of a model folder as sorted relative paths, none of them opened.

    Raises InputError when the folder is missing, unreadable or empty, and ModelRejectedError at the first file that is
    a link, not a plain file, or not of an allowed format; `pickles` allows those of torch.
    """
    if not folder.is_dir():
        raise InputError(
            f"the model folder {folder} does not exist" if not folder.exists() else f"{folder} is not a folder",
            expected="a folder in the layout of diffusers",
            action="check the path",
        )
    files: list[str] = []
    try:
        _walk(folder, "", files, [], pickles)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed ({error.strerror or error})",
            expected="a folder whose every part is readable",
            action="check its permissions",
        ) from error
    if not files:
        raise InputError(
            f"the model folder {folder} is empty",
            expected="a model in the layout of diffusers",
            action="check the path",
        )
    check_distinct(files)
    return tuple(sorted(Path(name) for name in files))


def format_of(name: str) -> str:
    """Return the format that a file name claims: `json`, `safetensors`, `text`, `pickle` or `unknown`."""
    path = PurePosixPath(name)
    if path.name in NAMES or path.suffix in (".md", ".txt"):
        return "text"
    if path.suffix in PICKLES:
        return "pickle"
    return path.suffix[1:] if path.suffix in SUFFIXES else "unknown"


def check_name(name: str, *, pickles: bool = False) -> None:
    """Raise ModelRejectedError unless the relative path `name` is a safe one of an allowed format."""
    _check_path(name)
    path = PurePosixPath(name)
    if path.name in NAMES or path.suffix in SUFFIXES or (pickles and path.suffix in TORCH_PICKLES):
        return
    if path.suffix in TORCH_PICKLES:
        raise ModelRejectedError(
            f"{name} is a pickle, which runs code when it is loaded",
            expected="weights as .safetensors only",
            action="convert it where you trust it, or allow checked pickles with --allow-pickles",
        )
    if path.suffix in PICKLES:
        raise ModelRejectedError(
            f"{name} is a pickle, which runs code when it is loaded",
            expected="weights as .safetensors",
            action="remove it, and ask where the model came from",
        )
    raise _rejected(f"{name} is not of a known format", f"only {', '.join(sorted(SUFFIXES | NAMES))}")


def check_count(count: int) -> None:
    """Raise ModelRejectedError when a folder holds more than MAX_FILES files, or folders."""
    if count > MAX_FILES:
        raise _rejected(f"the model folder holds more than {MAX_FILES} files", f"at most {MAX_FILES}")


def check_distinct(names: Iterable[str]) -> None:
    """Raise ModelRejectedError at names that differ in case alone: on some file systems they are one file."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise _rejected(f"the file names {other} and {name} differ in case alone", "names that differ everywhere")


def check_total(size: int) -> None:
    """Raise ModelRejectedError when all files together have more than MAX_TOTAL_BYTES."""
    if size > MAX_TOTAL_BYTES:
        raise ModelRejectedError(
            f"the model has {size} bytes",
            expected=f"at most {MAX_TOTAL_BYTES} bytes",
            action="check that the URI names one model",
        )


def _walk(folder: Path, prefix: str, files: list[str], folders: list[str], pickles: bool) -> None:
    """Append the names below `folder` to both lists; stop at the first that may not be there, however many follow."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            _check_path(name)
            is_folder = entry.is_dir(follow_symlinks=False)
            if not is_folder and not entry.is_file(follow_symlinks=False):
                raise _rejected(f"{name} is a link or a special file", "plain files only")
            kind = folders if is_folder else files
            kind.append(name)
            check_count(len(kind))
            if is_folder:
                _walk(folder / entry.name, f"{name}/", files, folders, pickles)
            else:
                check_name(name, pickles=pickles)


def _check_path(name: str) -> None:
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        raise _rejected(f"{name[:80]!r}: the model folder is nested too deeply", f"at most {MAX_DEPTH} levels")
    if len(name) > MAX_NAME or not all(part in NAMES or _PART.fullmatch(part) for part in parts):
        raise _rejected(
            f"the file name {name[:80]!r}",
            "a relative path of ASCII letters, digits, spaces and . _ + -",
        )


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(
        found, expected=expected, action="remove it if you know it, otherwise do not use this model"
    )
