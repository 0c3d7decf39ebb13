"""The commands for a whole registry: `scan-registry` looks through it, `serve-webhook` listens to it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from diffdefend_core.cli.cluster import cluster_of, connecting, placement_of, placing
from diffdefend_core.cli.context import current_flags, current_progress, current_settings, print_table
from diffdefend_core.cli.exit_codes import EXIT_ERROR, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS
from diffdefend_core.cli.options import FORMAT, WRITTEN, searching, shared, sourcing
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError

if TYPE_CHECKING:
    from diffdefend_core.report.registry_document import ScanRow, ScanSummary
    from diffdefend_core.stages.dispatch import Runner
    from diffdefend_core.stages.scan_metrics import Sink

SECRET_VARIABLE = "DIFFDEFEND_WEBHOOK_SECRET"
_SHORTEST_SECRET = 16
_LOG = logging.getLogger(__name__)

_CODES = """\b
Exit codes:
  0  the gate has decided on every version, and none is blocked
  1  a version is backdoored or blocked, now or by an earlier decision
  2  a version failed, whatever became of the others; or the tool failed or was misused
  3  no version is listed: nothing was looked at
"""

Command = TypeVar("Command", bound=Callable[..., Any])


def running(command: Command) -> Command:
    """Return the command with the flags that say where runs take place, and how many at a time."""
    command = connecting(placing(command), "--kfp", "Run on this Kubeflow Pipelines server [default: on this machine].")
    for option in (
        click.option("--give-aliases", is_flag=True, help="Give what passes its alias, as `run` does."),
        click.option("--limit", type=click.IntRange(1, 10080), default=720, show_default=True, metavar="MINUTES",
                     help="Stop a run that takes longer."),
        click.option("--jobs", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="N",
                     help="How many runs may be under way at a time."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("scan-registry", epilog=_CODES)
@click.option("--only", multiple=True, metavar="PATTERN", help="Only models whose name fits (* and ?); repeatable.")
@click.option("--since", default="", metavar="WHEN", help="Only versions registered since: 7d, 2026-01-31, or a time.")
@click.option("--dry-run", is_flag=True, help="Say what would be scanned, start nothing and write nothing.")
@click.option("--report", type=WRITTEN, metavar="FILE", help="Also write the HTML page here.")
@click.option(
    "--metrics",
    envvar="DIFFDEFEND_METRICS",
    metavar="WHERE",
    help="Send Prometheus metrics at the end: URL of a Pushgateway, or FILE.prom.",
)
@running
@searching
@sourcing
@FORMAT
@shared
def scan_registry(
    only: tuple[str, ...], since: str, dry_run: bool, report: Path | None, metrics: str | None, output: str, jobs: int,
    limit: int, **where: Any,
) -> int:  # fmt: skip
    """Let the gate decide on every version of the registry that has no valid signed decision.

    What does not pass loses its aliases; what passes gets none, unless --give-aliases says so. Interrupted, it goes on
    where it stopped when it is called again.
    """
    from diffdefend_core.report.registry_document import render_html, render_json
    from diffdefend_core.stages import registry_scan as stage
    from diffdefend_core.stages.gatekeeper import Gatekeeper

    settings = stage.gate_settings(current_settings(), give_aliases=where.pop("give_aliases"))
    sink = _sink(metrics)
    request = stage.Request(only=only, since=since, jobs=jobs, limit=60.0 * limit, dry_run=dry_run)
    with current_progress(), _runner(settings, start=not dry_run, **where) as runner:
        _warn_without_keys(settings)
        summary, page = stage.scan_registry(settings, runner, request, said=_say)
    if sink is not None:
        sink.send(summary, lambda: Gatekeeper(settings).undecided(settings.gate.champion))
    if report is not None:
        _write(report, render_html(summary))
    if output == "json":
        click.echo(render_json(summary), nl=False)
    else:
        _print(summary, page)
    return _code(summary)


@click.command("serve-webhook", epilog=f"The secret of the webhook comes from {SECRET_VARIABLE}.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N")
@click.option("--bind", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="0.0.0.0 inside a container.")
@running
@searching
@sourcing
@shared
def serve_webhook(port: int, bind: str, jobs: int, limit: int, **where: Any) -> None:
    """Receive registry events of MLflow and let the gate decide on new versions: POST /webhook.

    GET /healthz says whether it works, GET /metrics what it did (Prometheus).
    """
    import uvicorn

    from diffdefend_core.stages.gatekeeper import Gatekeeper
    from diffdefend_core.stages.registry_scan import gate_settings
    from diffdefend_core.webhook.app import build_app
    from diffdefend_core.webhook.deliveries import Deliveries
    from diffdefend_core.webhook.metrics import Metrics
    from diffdefend_core.webhook.queue import WorkQueue

    deliveries = Deliveries(_secret())
    settings = gate_settings(current_settings(), give_aliases=where.pop("give_aliases"))
    with current_progress(), _runner(settings, start=True, **where) as runner:
        _warn_without_keys(settings)
        metrics, gatekeeper = Metrics(), Gatekeeper(settings)
        metrics.watch(lambda: gatekeeper.undecided(settings.gate.champion))
        queue = WorkQueue(settings, runner, metrics, jobs=jobs, limit=60.0 * limit)
        queue.start()
        try:
            uvicorn.run(
                build_app(deliveries, queue, metrics), host=bind, port=port, log_level="warning", access_log=False,
                server_header=False,
            )  # fmt: skip
        finally:
            queue.stop()


@contextmanager
def _runner(settings: Settings, *, start: bool, **where: Any) -> Iterator[Runner]:
    """Yield the runner that the flags ask for. What cannot be used shows now, not at the first version."""
    from diffdefend_core.stages import attestation

    if where["host"]:
        from pipelines.kfp_runs import KfpRuns

        runs = KfpRuns(cluster_of(where), settings, placement=placement_of(where), **where)
        if start:
            runs.prepare()
        yield runs
        return
    from pipelines.local_runs import LocalRuns

    flags = current_flags()
    if start and attestation.signer(settings) is None:
        _LOG.warning("no signing key is configured: decisions stay unsigned, and the next scan repeats them")
    with LocalRuns(settings, quiet=not flags.get("verbose", False), verbose=flags.get("verbose", False)) as runner:
        yield runner


def _warn_without_keys(settings: Settings) -> None:
    from diffdefend_core.stages import attestation

    if not attestation.trusted_keys(settings):
        _LOG.warning("no trusted key is configured (signing.trusted_keys): no decision stands, all is scanned again")


def _sink(place: str | None) -> Sink | None:
    """Return where metrics go, if anywhere: what cannot be shows before the scan, not after it."""
    if not place:
        return None
    from diffdefend_core.stages.scan_metrics import Sink

    return Sink(place)


def _secret() -> str:
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < _SHORTEST_SECRET:
        raise InputError(
            f"{SECRET_VARIABLE} " + ("is shorter than 16 characters" if secret else "is not set"),
            expected="the secret that the webhook was created with in MLflow",
            action="make one, such as `openssl rand -hex 32`, and give it to both",
        )
    return secret


def _say(row: ScanRow) -> None:
    from diffdefend_core.report.text import printable

    if not current_flags().get("quiet", False):
        line = f"models:/{row.model}/{row.version}  {row.status.value}  {row.verdict or row.reason}"
        sys.stderr.write(printable(line) + f"  ({row.seconds:.0f} s)\n")


def _print(summary: ScanSummary, page: str | None) -> None:
    """Print a row for each version that is not simply in order, and the counts."""
    from diffdefend_core.report.registry_document import Status
    from diffdefend_core.report.table import plain_table

    rows = [row for row in summary.versions if row.status is not Status.SKIPPED or row.blocked]
    shown = [
        {
            "model": row.model, "version": row.version, "aliases": [f"@{alias}" for alias in row.aliases],
            "status": row.status.value, "verdict": row.verdict, "outcome": row.outcome, "why": row.reason,
        }
        for row in rows
    ]  # fmt: skip
    if shown:
        print_table(plain_table(shown))
    counts = summary.counts()
    words = [f"{number} {name}" for name, number in counts.items() if number or name != "waiting"]
    click.echo(f"{len(summary.versions)} versions: {', '.join(words)}")
    if page is not None:
        click.echo(f"report: {page}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", expected="a writable place", action="pick another"
        ) from error


def _code(summary: ScanSummary) -> int:
    if not summary.listed:
        return EXIT_INCONCLUSIVE
    if summary.counts()["failed"]:
        return EXIT_ERROR
    return EXIT_FAIL if summary.blocked else EXIT_PASS
