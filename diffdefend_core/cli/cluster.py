"""The commands that talk to a Kubeflow Pipelines server: `submit` and `schedule`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from diffdefend_core.cli.context import current_settings
from diffdefend_core.cli.options import FORMAT, NAME, searching, shared

if TYPE_CHECKING:
    from pipelines.cluster import Cluster, Schedule
    from pipelines.placement import Placement

Command = TypeVar("Command", bound=Callable[..., Any])


def placing(command: Command) -> Command:
    """Return the command with the flags that say where tasks run; `placement_of` reads what they were given."""
    env = "DIFFDEFEND_"
    for option in (
        click.option("--require-digests", is_flag=True, envvar=f"{env}REQUIRE_DIGESTS", help="Refuse images by tag."),
        click.option("--keep-hours", type=click.IntRange(0, 8760), default=0, envvar=f"{env}KEEP_HOURS", metavar="N",
                     help="Delete the workflow object so long after the end of a run [default: the server's own]."),
        click.option("--minutes", type=click.IntRange(1, 10080), default=240, envvar=f"{env}MINUTES", metavar="N",
                     show_default=True, help="Time-out of a task that computes."),
        click.option("--retries", type=click.IntRange(0, 10), default=2, envvar=f"{env}RETRIES", metavar="N",
                     show_default=True, help="Retries of a failed task."),
        click.option("--pull-secret", default="", envvar=f"{env}PULL_SECRET", metavar="NAME",
                     help="Secret with the registry's login."),
        click.option("--scratch-class", default="", envvar=f"{env}SCRATCH_CLASS", metavar="NAME",
                     help="Storage class of the scratch volume [default: the node's disk]."),
        click.option("--scratch", default="20Gi", envvar=f"{env}SCRATCH", metavar="SIZE", show_default=True,
                     help="Size of the scratch volume of a task that moves weights."),
        click.option("--memory", default="16Gi", envvar=f"{env}MEMORY", metavar="SIZE", show_default=True,
                     help="Memory limit of a task that computes."),
        click.option("--toleration", multiple=True, envvar=f"{env}TOLERATION", metavar="KEY[=VALUE][:EFFECT]",
                     help="Taint that tasks that compute tolerate; repeatable."),
        click.option("--node-selector", multiple=True, envvar=f"{env}NODE_SELECTOR", metavar="LABEL=VALUE",
                     help="Label of the nodes for tasks that compute; repeatable."),
        click.option("--gpu", is_flag=True, envvar=f"{env}GPU", help="Ask for an accelerator for tasks that compute."),
    ):  # fmt: skip
        command = option(command)
    return command


def connecting(command: Command, flag: str = "--host", meaning: str = "Address of the server.") -> Command:
    """Return the command with the flags that name the server; `cluster_of` reads what they were given."""
    env = "DIFFDEFEND_KFP_"
    for option in (
        click.option("--ca-file", default="", envvar=f"{env}CA_FILE", metavar="FILE", help="Certificates to trust."),
        click.option("--service-account", default="", envvar=f"{env}SERVICE_ACCOUNT", metavar="NAME",
                     help="Service account of the pods [default: the server's own]."),
        click.option("--namespace", default="", envvar=f"{env}NAMESPACE", metavar="NAME",
                     help="Namespace of a profile; needed by a server with many users."),
        click.option(flag, "host", default="", envvar=f"{env}HOST", metavar="URL", help=meaning),
    ):  # fmt: skip
        command = option(command)
    return command


def placement_of(given: dict[str, Any]) -> Placement:
    """Return the placement that the flags of `placing` ask for, taking them out of `given`. Raises InputError."""
    from pipelines.placement import Placement, Toleration, parse_selector

    tolerations = tuple(Toleration.parse(text) for text in given.pop("toleration"))
    selectors = tuple(parse_selector(text) for text in given.pop("node_selector"))
    names = ("gpu", "memory", "scratch", "scratch_class", "pull_secret", "retries", "minutes", "keep_hours")
    return Placement(tolerations=tolerations, node_selectors=selectors, **{name: given.pop(name) for name in names})


def cluster_of(given: dict[str, Any]) -> Cluster:
    """Return the server that the flags of `connecting` name, taking them out of `given`. Raises InputError."""
    from pipelines.cluster import Cluster

    names = ("host", "namespace", "service_account", "ca_file")
    return Cluster(experiment=current_settings().experiment, **{name: given.pop(name) for name in names})


@click.command()
@click.argument("source", metavar="MODEL_URI")
@NAME
@connecting
@placing
@searching
@FORMAT
@shared
def submit(source: str, name: str | None, output: str, **given: Any) -> None:
    """Start the whole gate for one model as a run on Kubeflow Pipelines, and print the run's page.

    A token for the server comes from DIFFDEFEND_KFP_TOKEN, a session cookie from DIFFDEFEND_KFP_COOKIE.
    """
    run = cluster_of(given).submit(source, current_settings(), placement=placement_of(given), name=name or "", **given)
    click.echo(json.dumps(asdict(run), indent=2, sort_keys=True) if output == "json" else run.url)


@click.group()
def schedule() -> None:
    """Recurring runs on Kubeflow Pipelines; one model goes through the gate, up to 20 through one run of a loop."""


def _scheduling(command: Command) -> Command:
    for option in (
        shared, FORMAT, searching, placing, connecting,
        click.option("--cron", required=True, metavar="EXPRESSION", help="Six fields, seconds first: '0 0 3 * * *'."),
        click.argument("sources", metavar="MODEL_URI...", nargs=-1, required=True),
        click.argument("name"),
    ):  # fmt: skip
        command = option(command)
    return command


@schedule.command()
@_scheduling
def create(name: str, sources: tuple[str, ...], cron: str, output: str, **given: Any) -> None:
    """Create the schedule NAME for one model or a few."""
    made = cluster_of(given).create(name, sources, cron, current_settings(), placement=placement_of(given), **given)
    _print([made], output)


@schedule.command()
@_scheduling
def update(name: str, sources: tuple[str, ...], cron: str, output: str, **given: Any) -> None:
    """Replace the schedule NAME: a new one is created, then the old one is deleted."""
    made = cluster_of(given).update(name, sources, cron, current_settings(), placement=placement_of(given), **given)
    _print([made], output)


@schedule.command()
@click.argument("name", required=False)
@connecting
@FORMAT
@shared
def show(name: str | None, output: str, **given: Any) -> None:
    """Print the schedules of the experiment, or those called NAME."""
    _print(cluster_of(given).schedules(name), output)


@schedule.command()
@click.argument("name")
@connecting
@shared
def remove(name: str, **given: Any) -> None:
    """Delete the schedule NAME; runs that have begun go on."""
    count = cluster_of(given).remove(name)
    click.echo(f"removed {count} schedule{'s' if count > 1 else ''} {name}")


def _print(schedules: list[Schedule], output: str) -> None:
    if output == "json":
        click.echo(json.dumps([asdict(item) for item in schedules], indent=2, sort_keys=True))
        return
    for item in schedules:
        state = "on" if item.enabled else "off"
        click.echo(f"{item.name}  {state}  {item.cron}  {' '.join(item.sources)}  {item.schedule_id}")
