"""The commands around the installation: compile the gate, show the settings, say what is present."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffdefend_core.cli.cluster import placement_of, placing
from diffdefend_core.cli.context import current_settings
from diffdefend_core.cli.options import FORMAT, WRITTEN, searching, shared
from diffdefend_core.config import without_password


@click.command("compile")
@click.option("-o", "--output", type=WRITTEN, required=True, metavar="FILE", help="Where the YAML goes.")
@click.option("--pipeline", type=click.Choice(["gate", "scan"]), default="gate", show_default=True,
              help="The gate for one model, or for each of a short list.")  # fmt: skip
@click.option("--manifest", metavar="VERSION",
              help="Write the objects Pipeline and PipelineVersion instead; VERSION names the latter.")  # fmt: skip
@click.option("--namespace", default="", metavar="NAME", help="Namespace of these objects.")
@placing
@searching
@shared
def compile_command(output: Path, pipeline: str, manifest: str | None, namespace: str, **given: Any) -> None:
    """Compile a pipeline for Kubeflow Pipelines; the seed and the options that hold here are its default settings."""
    from pipelines.compile import Manifest, compile_pipeline

    objects = Manifest(version=manifest, namespace=namespace) if manifest is not None else None
    compile_pipeline(
        pipeline, output, science=current_settings().science_json(), placement=placement_of(given), manifest=objects,
        **given,
    )  # fmt: skip
    click.echo(str(output))


@click.group()
def config() -> None:
    """The settings."""


@config.command()
@FORMAT
@shared
def show(output: str) -> None:
    """Print the settings that hold here, after flags, environment and file."""
    settings = current_settings()
    plain = settings.model_dump(mode="json")
    plain["tracking_uri"] = without_password(settings.tracking_uri)
    plain["config_digest"] = settings.digest()
    if output == "json":
        click.echo(json.dumps(plain, indent=2, sort_keys=True))
        return
    import yaml

    click.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)


@click.command()
@FORMAT
@shared
def doctor(output: str) -> None:
    """Say which optional parts are present."""
    from diffdefend_core.doctor import examine

    checks = examine(current_settings())
    if output == "json":
        click.echo(json.dumps({name: {"present": ok, "remark": remark} for name, ok, remark in checks}, indent=2))
        return
    width = max(len(name) for name, _, _ in checks)
    for name, ok, remark in checks:
        click.echo(f"{'ok' if ok else 'no'} {name:{width}} {remark}")
