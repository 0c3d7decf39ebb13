"""The commands around models: check noise, calibrate, list what is there, plant a backdoor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffdefend_core.cli.context import current_progress, current_settings, print_table
from diffdefend_core.cli.exit_codes import EXIT_FAIL, EXIT_PASS
from diffdefend_core.cli.options import FORMAT, searching, shared, sourcing

_CHECK_CODES = """\b
Exit codes:
  0  no row is flagged
  1  a row is flagged
  2  the tool failed or was misused
"""


@click.command("check-input", epilog=_CHECK_CODES)
@click.argument("noise", metavar="NOISE")
@click.option("--trigger", "trigger_uri", metavar="URI", help="File with `trigger`, or folder of invert-trigger.")
@click.option("--model", "model_uri", metavar="MODEL_URI", help="Also ask this model (UFID), which takes long.")
@click.option("--sampler", metavar="NAME", help="What the model paints with [default: its usual one].")
@click.option(
    "--false-positive-rate", "rate", default=0.001, show_default=True, metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Share of clean noise that each check may flag.",
)  # fmt: skip
@FORMAT
@shared
def check_input(
    noise: str, trigger_uri: str | None, model_uri: str | None, sampler: str | None, rate: float, output: str
) -> int:
    """Say whether initial noise carries a trigger.

    NOISE is a .npy file, or a safetensors file with `noise`: [C, H, W] or [N, C, H, W], in units of the initial noise.
    """
    from diffdefend_core.report.table import plain_table
    from diffdefend_core.stages import check_input as stage

    with current_progress() as progress:
        document = stage.check_input(
            noise, settings=current_settings(), trigger_uri=trigger_uri or "", model_uri=model_uri or "",
            sampler=sampler or "", false_positive_rate=rate, progress=progress,
        )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_table(plain_table(stage.table_rows(document)))
    return EXIT_FAIL if document["flagged"] else EXIT_PASS


@click.command()
@click.argument("sources", metavar="MODEL_URI...", nargs=-1, required=True)
@click.option("--name", required=True, metavar="NAME", help="Name of the calibration in results.")
@searching
@sourcing
@FORMAT
@shared
def calibrate(sources: tuple[str, ...], name: str, output: str) -> None:
    """Measure clean models of one family and shape: what is ordinary for `detection.calibration`.

    Prints the URI of the calibration and what it says of each of its own models when that one is left out.
    """
    from diffdefend_core.detection import Calibration
    from diffdefend_core.stages import calibrate as stage
    from diffdefend_core.stages.folder import read_record

    settings = current_settings()
    with current_progress() as progress:
        uri = stage.calibrate(sources, name=name, settings=settings, progress=progress)
    calibration = read_record(Calibration, uri, "calibration")
    rows: list[dict[str, Any]] = [
        {"model": item.name, "verdict": item.word.value, "probability": round(item.probability, 3)}
        for item in stage.held_out(calibration, settings)
    ]
    if output == "json":
        click.echo(json.dumps({"uri": uri, "digest": calibration.digest(), "held_out": rows}, indent=2))
        return
    from diffdefend_core.report.table import plain_table

    print_table(plain_table(rows))
    click.echo(uri)


@click.command("list")
@click.argument("kind", type=click.Choice(["families", "samplers", "attacks", "methods"]))
@FORMAT
@shared
def list_kind(kind: str, output: str) -> None:
    """Print what is there: families, samplers, attacks or methods."""
    from diffdefend_core.stages.catalogue import KINDS

    rows = KINDS[kind]()
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    from diffdefend_core.report.table import plain_table

    print_table(plain_table(rows))


@click.command()
@click.argument("source", metavar="MODEL_URI")
@click.option("--method", required=True, metavar="NAME", help="An attack of `diffdefend list attacks`.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new or empty folder.")
@click.option("--trigger", default="checker", show_default=True, metavar="NAME", help="Trigger picture.")
@click.option("--target", default="ring", show_default=True, metavar="NAME", help="What is painted: NAME or class:K.")
@click.option("--poison-rate", default=0.3, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--steps", default=1500, show_default=True, type=click.IntRange(1))
@click.option("--learning-rate", default=1e-3, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Clean images, with labels for some attacks [default: the model's own samples].",
)
@FORMAT
@shared
def attack(
    source: str, method: str, to: Path, trigger: str, target: str, poison_rate: float, steps: int,
    learning_rate: float, data: Path | None, output: str,
) -> None:  # fmt: skip
    """Plant a backdoor in a copy of a model, to test defences with. RED-TEAM TOOL.

    What it writes must never be deployed or published: the model, the backdoor that fires it, and a card with the
    measured attack success before and after.
    """
    from diffdefend_core.stages import attack as stage

    options = stage.AttackOptions(
        method=method, trigger=trigger, target=target, poison_rate=poison_rate, steps=steps, learning_rate=learning_rate
    )
    click.echo(f"diffdefend: warning: {stage.WARNING}", err=True)
    with current_progress() as progress:
        card = stage.attack(source, to, options, settings=current_settings(), data=data, progress=progress)
    if output == "json":
        click.echo(json.dumps(card, indent=2))
        return
    success = f", attack success {card['asr']:.0%} (before: {card['asr_before']:.0%})" if "asr" in card else ""
    click.echo(f"{method} planted in {to / 'model'}, fires with {card['sampler']}{success}")
