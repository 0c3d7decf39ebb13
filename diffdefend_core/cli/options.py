"""Options that many commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from diffdefend_core.config import PEERS

Command = TypeVar("Command", bound=Callable[..., Any])

METHODS = ("diffdefend", *PEERS)
WRITTEN = click.Path(path_type=Path)
NAME = click.option("--name", metavar="NAME", help="Name of the model in reports and registry.")
FORMAT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


def shared(command: Command) -> Command:
    """Return the command with the global flags added; `context` reads them."""
    flag: dict[str, Any] = {"expose_value": False, "callback": _remember}
    for option in (
        click.option("--no-color", is_flag=True, help="No colours.", **flag),
        click.option("--verbose", is_flag=True, help="Debug logs; tracebacks of errors.", **flag),
        click.option("--quiet", is_flag=True, help="No progress and no logs.", **flag),
        click.option("--set", multiple=True, metavar="GROUP.FIELD=VALUE", help="Set one option; repeatable.", **flag),
        click.option("--seed", metavar="N", help="Seed of everything random.", **flag),
        click.option("--adapter", metavar="NAME", help="Reads the model: entry point or module:function.", **flag),
        click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.", **flag),
        click.option("--tracking-uri", metavar="URI", help="MLflow server or sqlite:/// file.", **flag),
        click.option("--store", metavar="URI", help="Artifact store: s3:// or file:// URI.", **flag),
        click.option(
            "--config", type=click.Path(path_type=Path), metavar="FILE",
            help="TOML or YAML file of settings [default: diffdefend.toml, if there is one].", **flag,
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def searching(command: Command) -> Command:
    """Return the command with the flags that say how a trigger is searched; `context` reads them."""
    for option in (
        click.option(
            "--reference", metavar="URI", expose_value=False, callback=_remember,
            help="Trusted clean model of the same family and shape, which sharpens the search.",
        ),
        click.option(
            "--method", type=click.Choice(METHODS), expose_value=False, callback=_remember,
            help="Method of detection [default: diffdefend].",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def sourcing(command: Command) -> Command:
    """Return the command with the flags that widen what may be loaded; `context` reads them."""
    for option in (
        click.option(
            "--allow-network", is_flag=True, expose_value=False, callback=_remember,
            help="Fetch hf:// models from the Hub; without it only the local cache is read.",
        ),
        click.option(
            "--allow-pickles", is_flag=True, expose_value=False, callback=_remember,
            help="Take pickles of torch that pass all checks, converted to safetensors.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a global flag, given before or after the command; the later place wins, `--set` adds up."""
    flags: dict[str, Any] = ctx.ensure_object(dict)
    if param.name == "set":
        flags.setdefault("set", []).extend(value)
    elif value is not None and value is not False:
        flags[str(param.name)] = value
