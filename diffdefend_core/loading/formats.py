"""Which files a model folder may hold: an allow-list, with limits. Anything else is refused unread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from diffdefend_core.errors import InputError, ModelRejectedError

MAX_FILES = 200
MAX_DEPTH = 4
MAX_NAME = 255
SUFFIXES = frozenset((".json", ".safetensors", ".md", ".txt"))
NAMES = frozenset((".gitattributes", "LICENSE"))
PICKLES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))


def list_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model folder as sorted relative paths, none of them opened.

    Raises InputError when the folder is missing or empty, and ModelRejectedError at the first file that is a link, not
    a plain file, or not of an allowed format.
    """
    if not folder.is_dir():
        raise InputError(
            f"the model folder {folder} does not exist" if not folder.exists() else f"{folder} is not a folder",
            expected="a folder in the layout of diffusers",
            action="check the path",
        )
    files = []
    for path in _walk(folder):
        check_name(path.relative_to(folder).as_posix())
        if path.is_symlink() or not path.is_file():
            raise _rejected(f"{path.relative_to(folder)} is a link or a special file", "plain files only")
        files.append(path.relative_to(folder))
        check_count(len(files))
    if not files:
        raise InputError(
            f"the model folder {folder} is empty",
            expected="a model in the layout of diffusers",
            action="check the path",
        )
    return tuple(sorted(files))


def check_name(name: str) -> None:
    """Raise ModelRejectedError unless the relative path `name` is a safe one of an allowed format."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and name == "/".join(path.parts) and not path.is_absolute()
    if not plain or ".." in path.parts or not 0 < len(path.parts) <= MAX_DEPTH or len(name) > MAX_NAME:
        raise _rejected(f"the file name {name[:80]!r}", "a plain relative path inside the model folder")
    if path.name in NAMES or path.suffix in SUFFIXES:
        return
    if path.suffix in PICKLES:
        raise ModelRejectedError(
            f"{name} is a pickle, which runs code when it is loaded",
            expected="weights as .safetensors only",
            action="convert the weights to safetensors where you trust them, and remove the pickle",
        )
    raise _rejected(f"{name} is not of a known format", f"only {', '.join(sorted(SUFFIXES | NAMES))}")


def check_count(count: int) -> None:
    """Raise ModelRejectedError when a folder holds more than MAX_FILES files."""
    if count > MAX_FILES:
        raise _rejected(f"the model folder holds more than {MAX_FILES} files", f"at most {MAX_FILES}")


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, files in os.walk(folder, followlinks=False):
        links = [name for name in folders if (Path(base) / name).is_symlink()]
        if len(Path(base).relative_to(folder).parts) >= MAX_DEPTH:
            raise _rejected("the model folder is nested too deeply", f"at most {MAX_DEPTH} levels")
        yield from (Path(base) / name for name in [*links, *files])


def _rejected(found: str, expected: str) -> ModelRejectedError:
    return ModelRejectedError(
        found, expected=expected, action="remove it if you know it, otherwise do not use this model"
    )
