"""The command that looks at a model without loading it."""

from __future__ import annotations

import json
from typing import Any

import click

from diffdefend_core.cli.context import current_settings, print_table
from diffdefend_core.cli.exit_codes import EXIT_FAIL, EXIT_PASS
from diffdefend_core.cli.options import FORMAT, shared, sourcing

_CODES = """\b
Exit codes:
  0  the model would be loaded
  1  the model would be refused
  2  there is nothing, or the tool failed or was misused
"""


@click.command(epilog=_CODES)
@click.argument("source", metavar="MODEL_URI")
@sourcing
@FORMAT
@shared
def inspect(source: str, output: str) -> int:
    """Say what is in a model and whether it would be loaded, without loading it.

    Prints files with their digests, classes, shapes, dtypes and findings; every tensor with `-o json`.
    """
    from diffdefend_core.stages.inspect_model import inspect_model

    document = inspect_model(source, settings=current_settings())
    if output == "json":
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        _print(document)
    return EXIT_PASS if document["accepted"] else EXIT_FAIL


def _print(document: dict[str, Any]) -> None:
    from diffdefend_core.report.table import plain_table

    print_table(plain_table([{"": name, " ": value} for name, value in _facts(document).items()]))
    print_table(plain_table([{**file, "sha256": file["sha256"] or "not read"} for file in document["files"]]))


def _facts(document: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the model, one line each."""
    facts = {
        "model": document["name"],
        "would be": "loaded" if document["accepted"] else "refused",
        "because": document["refusal"],
        "family": document["family"],
        "pipeline": document["pipeline"],
        "classes": [f"{part}: {name}" for part, name in document["classes"].items()],
        "shape": document["shape"],
        "picture shape": document["picture_shape"],
        "parameters": document["parameters"],
        "dtypes": [f"{dtype}: {count}" for dtype, count in document["dtypes"].items()],
        "tensors": len(document["tensors"]),
        "digest": document["digest"],
    }
    findings = {f"finding {number}": text for number, text in enumerate(document["findings"], 1)}
    return {**{name: value for name, value in facts.items() if value}, **findings}
