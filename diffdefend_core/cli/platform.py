"""The commands around the installation: compile the gate, show the settings, say what is present."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diffdefend_core.cli.context import current_settings
from diffdefend_core.cli.options import FORMAT, WRITTEN, shared
from diffdefend_core.config import without_password


@click.command("compile")
@click.option("-o", "--output", type=WRITTEN, required=True, metavar="FILE", help="Where the YAML goes.")
@click.option("--gpu", is_flag=True, help="Ask for an accelerator for the stages that compute.")
@shared
def compile_pipeline(output: Path, gpu: bool) -> None:
    """Compile the gate for Kubeflow Pipelines, with the seed and the options that hold here as its default settings."""
    from pipelines.compile import compile_gate

    compile_gate(output, science=current_settings().science_json(), gpu=gpu)
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
    for name, ok, remark in checks:
        click.echo(f"{'ok' if ok else 'no':3}{name:16}{remark}")
