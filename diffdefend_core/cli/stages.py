"""The commands of a single stage, as the steps of a pipeline call them: each prints the URI of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diffdefend_core.cli.context import current_progress, current_settings
from diffdefend_core.cli.options import NAME, WRITTEN, Command, searching, shared, sourcing

_MODEL = click.option("--model", "model_uri", required=True, metavar="URI", help="Folder of the load stage.")
_TRIGGER = click.option("--trigger", "trigger_uri", required=True, metavar="URI", help="Folder of invert-trigger.")
_VERDICT = click.option("--verdict", "verdict_uri", required=True, metavar="URI", help="Folder of detect.")
_CANDIDATE = click.option(
    "--candidate", "candidate_uri", required=True, metavar="URI", help="Folder of keep, purify, quarantine."
)


def _stage(command: Command) -> Command:
    """Add what every command of a single stage takes."""
    science = click.option("--settings", "science", metavar="JSON", help="Seed and options, as a pipeline hands them.")
    written = click.option("--uri-output", type=WRITTEN, metavar="FILE", help="Also write the URI to this file.")
    return shared(science(written(command)))


@click.command()
@click.option("--source", required=True, metavar="URI", help="Folder, s3://, file://, hf:// or models:/ URI.")
@NAME
@sourcing
@_stage
def load(source: str, name: str | None, science: str | None, uri_output: Path | None) -> None:
    """Fetch a model and refuse what may not be loaded."""
    from diffdefend_core.stages import load as stage

    _hand_over(stage.load(source, settings=current_settings(science), name=name or None), uri_output)


@click.command("invert-trigger")
@_MODEL
@searching
@_stage
def invert_trigger(model_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Search the trigger that a backdoored model would answer to (also: invert)."""
    from diffdefend_core.stages import invert_trigger as stage

    with current_progress() as progress:
        uri = stage.invert_trigger(model_uri, settings=current_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@click.command()
@_MODEL
@_TRIGGER
@click.option("--word-output", type=WRITTEN, metavar="FILE", help="Also write the verdict's word to this file.")
@searching
@_stage
def detect(
    model_uri: str, trigger_uri: str, word_output: Path | None, science: str | None, uri_output: Path | None
) -> None:
    """Say whether a model carries a backdoor."""
    from diffdefend_core.artifacts import Verdict
    from diffdefend_core.stages import detect as stage
    from diffdefend_core.stages.folder import read_record

    with current_progress() as progress:
        uri = stage.detect(model_uri, trigger_uri, settings=current_settings(science), progress=progress)
    if word_output:
        _write(word_output, read_record(Verdict, uri, "verdict").word.value)
    _hand_over(uri, uri_output)


@click.command()
@_MODEL
@_TRIGGER
@_VERDICT
@_stage
def keep(model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Pass a clean model on as it is."""
    from diffdefend_core.stages import keep as stage

    _hand_over(stage.keep(model_uri, trigger_uri, verdict_uri, settings=current_settings(science)), uri_output)


@click.command()
@_MODEL
@_TRIGGER
@_VERDICT
@searching
@_stage
def purify(model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Remove the backdoor and scan the repaired model again."""
    from diffdefend_core.stages import purify as stage

    with current_progress() as progress:
        uri = stage.purify(model_uri, trigger_uri, verdict_uri, settings=current_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@click.command()
@_MODEL
@_TRIGGER
@_VERDICT
@_stage
def quarantine(
    model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None
) -> None:
    """Set a model aside whose verdict is inconclusive."""
    from diffdefend_core.stages import quarantine as stage

    _hand_over(stage.quarantine(model_uri, trigger_uri, verdict_uri, settings=current_settings(science)), uri_output)


@click.command()
@_CANDIDATE
@_stage
def evaluate(candidate_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Measure quality and attack success, before and after repair."""
    from diffdefend_core.stages import evaluate as stage

    with current_progress() as progress:
        uri = stage.evaluate(candidate_uri, settings=current_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@click.command()
@_CANDIDATE
@click.option("--scorecard", "scorecard_uri", required=True, metavar="URI", help="Folder of evaluate.")
@NAME
@click.option("--outcome-output", type=WRITTEN, metavar="FILE", help="Also write the outcome's word to this file.")
@click.option("--report-output", type=WRITTEN, metavar="FILE", help="Also write the HTML report to this file.")
@click.option("--metrics-output", type=WRITTEN, metavar="FILE", help="Also write the measured values to this file.")
@click.option("--executor-input", metavar="JSON", help="What KFP tells its steps; shows report and metrics there.")
@_stage
def register(
    candidate_uri: str, scorecard_uri: str, name: str | None, outcome_output: Path | None, report_output: Path | None,
    metrics_output: Path | None, executor_input: str | None, science: str | None, uri_output: Path | None,
) -> None:  # fmt: skip
    """Apply the gate's rules and tell the model registry."""
    from diffdefend_core.stages import register as stage
    from diffdefend_core.stages import shown

    uri = stage.register(candidate_uri, scorecard_uri, settings=current_settings(science), name=name or None)
    if outcome_output:
        _write(outcome_output, shown.outcome(uri))
    if report_output:
        _write(report_output, shown.report(uri))
    metrics = shown.metrics(scorecard_uri)
    if metrics_output:
        _write(metrics_output, json.dumps(metrics, sort_keys=True))
    if executor_input:
        _write(*shown.executor_output(executor_input, metrics))
    _hand_over(uri, uri_output)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _hand_over(uri: str, uri_output: Path | None) -> None:
    if uri_output:
        _write(uri_output, uri)
    click.echo(uri)
