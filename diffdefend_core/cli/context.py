"""What the global flags of the current command ask for: settings, progress, logs and colour."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from diffdefend_core.config import Settings, load_settings, merge_flags, parse_assignment
from diffdefend_core.progress import Progress, reporting

_SETTINGS = ("store", "tracking_uri", "device", "seed", "adapter", "allow_pickles", "allow_network")
_SEARCH = ("method", "reference")


def current_flags() -> dict[str, Any]:
    """Return the global flags that were given, by name; `set` holds all assignments."""
    flags: dict[str, Any] = click.get_current_context().ensure_object(dict)
    return flags


def current_settings(science: str | None = None) -> Settings:
    """Return the settings of the current command; an empty flag is one that was not given.

    A local policy file is read at once, because the steps of a pipeline may not see it.
    """
    from diffdefend_core.stages.policies import settled

    flags = current_flags()
    given = {name: flags[name] for name in _SETTINGS if flags.get(name)}
    search = {name: flags[name] for name in _SEARCH if flags.get(name)}
    if "reference" in search and Path(search["reference"]).is_dir():
        search["reference"] = str(Path(search["reference"]).absolute())  # steps of a pipeline run elsewhere
    given = merge_flags(
        given, {"inversion": search} if search else {}, *(parse_assignment(text) for text in flags.get("set", []))
    )
    if science:
        return Settings.from_science(science, flags.get("config"), **given)
    return settled(load_settings(flags.get("config"), **given))


def current_progress() -> AbstractContextManager[Progress | None]:
    """Start the logs and return the progress to report to while it is open; None with `--quiet`."""
    flags = current_flags()
    _start_logging(flags)
    return reporting(quiet=flags.get("quiet", False), color=not flags.get("no_color", False))


def _start_logging(flags: dict[str, Any]) -> None:
    level = logging.ERROR if flags.get("quiet") else logging.DEBUG if flags.get("verbose") else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("diffdefend_core").setLevel(level)
    if not flags.get("verbose"):
        # Each retry is a warning there, and the last one is our line. Clients set the level of "urllib3" itself.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def print_table(table: object) -> None:
    """Print a table to stdout: in colour on a terminal, and not cut to 80 columns elsewhere."""
    from rich.console import Console

    flags = current_flags()
    width = None if sys.stdout.isatty() else 160
    Console(no_color=flags.get("no_color", False) or None, width=width).print(table)
