"""The commands for one model as a whole: `scan` finds a backdoor, `run` is the whole gate."""

from __future__ import annotations

import json
import time

import click

from diffdefend_core.cli.context import current_flags, current_progress, current_settings, print_table
from diffdefend_core.cli.exit_codes import EXIT_CODES_HELP, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS
from diffdefend_core.cli.options import FORMAT, NAME, searching, shared, sourcing

_VERDICT_CODES = {"clean": EXIT_PASS, "backdoored": EXIT_FAIL}


@click.command(epilog=EXIT_CODES_HELP)
@click.argument("source", metavar="MODEL_URI")
@NAME
@searching
@sourcing
@FORMAT
@shared
def scan(source: str, name: str | None, output: str) -> int:
    """Load, invert and detect in one go: is this model backdoored?"""
    from diffdefend_core.report.scan_document import scan_document
    from diffdefend_core.report.table import verdict_table
    from diffdefend_core.stages import scan as stage

    settings, began = current_settings(), time.monotonic()
    with current_progress() as progress:
        uris = stage.scan(source, settings=settings, name=name, progress=progress)
    model, _, verdict = stage.read(*uris)
    document = scan_document(
        model, verdict, uris=dict(zip(("model_uri", "trigger_uri", "verdict_uri"), uris, strict=True)),
        config_digest=settings.digest(), seconds=time.monotonic() - began,
    )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(document, indent=2, sort_keys=True, allow_nan=False))
    else:
        print_table(verdict_table(model, verdict))
    return _VERDICT_CODES.get(verdict.word.value, EXIT_INCONCLUSIVE)


@click.command(epilog=EXIT_CODES_HELP)
@click.argument("source", metavar="MODEL_URI")
@NAME
@click.option("--docker", is_flag=True, help="Run the stages in containers.")
@searching
@sourcing
@FORMAT
@shared
def run(source: str, name: str | None, docker: bool, output: str) -> int:
    """Run the whole gate on this machine: scan, repair, evaluate, register.

    Exits 0 only if the model itself was promoted. A repaired model gets its own version in the registry, yet the exit
    code is 1: the model that was given is backdoored.
    """
    from diffdefend_core.report.table import summary_table
    from diffdefend_core.stages.shown import summary
    from pipelines.local import run_gate

    flags = current_flags()
    result = run_gate(
        source, current_settings(), name=name or "", docker=docker,
        quiet=flags.get("quiet", False), verbose=flags.get("verbose", False),
    )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(result, indent=2, sort_keys=True, allow_nan=False))
    else:
        print_table(summary_table([summary(result["gate_uri"], result["scorecard_uri"], result["candidate_uri"])]))
        click.echo(f"report: {result['gate_uri']}report.html")
    if result["outcome"] == "promoted":
        return EXIT_PASS
    return EXIT_INCONCLUSIVE if result["word"] == "inconclusive" else EXIT_FAIL
