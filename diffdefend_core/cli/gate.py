"""The commands around a decision: the policy that it follows, the key that signs it, the gate that asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffdefend_core.cli.context import current_settings, print_table
from diffdefend_core.cli.exit_codes import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS
from diffdefend_core.cli.options import FORMAT, shared

if TYPE_CHECKING:
    from diffdefend_core.stages.gatekeeper import Check

_CODES = """\b
Exit codes:
  0  {yes}
  1  {no}
  2  the tool failed or was misused
"""


@click.group()
def gate() -> None:
    """May this model be deployed? Asks the signed decision, the bytes, and nobody else."""


@gate.command(epilog=_CODES.format(yes="every decision holds", no="one does not; each reason is a line"))
@click.argument("sources", metavar="MODEL_URI...", nargs=-1, required=True)
@click.option("--decision", metavar="FILE", help="Signed decision, file or URI [default: that of the version's tag].")
@FORMAT
@shared
def check(sources: tuple[str, ...], decision: str | None, output: str) -> int:
    """Verify the signed decision of each model against its bytes, the policy, the keys and the clock.

    MODEL_URI is models:/name@alias, models:/name/version, or a folder, s3:// or file:// URI with --decision.
    """
    from diffdefend_core.stages.gatekeeper import Gatekeeper

    if decision is not None and len(sources) > 1:
        raise click.UsageError("--decision is about one model; give one MODEL_URI with it")
    gatekeeper = Gatekeeper(current_settings())
    checks = [gatekeeper.check(source, decision=decision) for source in sources]
    _show(checks, output)
    return EXIT_PASS if all(item.holds for item in checks) else EXIT_FAIL


@gate.command(
    epilog=_CODES.format(yes="every alias points at a version whose decision holds", no="one does not")
    + "  3  there is no alias: nothing was audited\n"
)
@click.option("--only", multiple=True, metavar="NAME", help="Only this registered model; repeatable.")
@FORMAT
@shared
def audit(only: tuple[str, ...], output: str) -> int:
    """List the aliases of the registry, and which point at unscanned, changed, expired or failed versions."""
    from diffdefend_core.stages.gatekeeper import Gatekeeper

    rows = list(Gatekeeper(current_settings()).audit(only))
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        from diffdefend_core.report.table import plain_table

        print_table(plain_table(rows))
    else:
        click.echo("no alias is set in this registry")
    if not rows:
        return EXIT_INCONCLUSIVE
    return EXIT_PASS if all(row["state"] == "ok" for row in rows) else EXIT_FAIL


@gate.command(epilog=_CODES.format(yes="the alias points at it", no="it was not moved; each reason is a line"))
@click.argument("source", metavar="MODEL_URI")
@click.option("--alias", required=True, metavar="ALIAS", help="The alias to move, such as champion.")
@click.option("--to", metavar="NAME", help="Copy the version into this registered model; the alias is that one's.")
@FORMAT
@shared
def promote(source: str, alias: str, to: str | None, output: str) -> int:
    """Move an alias to a version whose decision holds: checked before the move, and again after it.

    MODEL_URI is models:/name/version or models:/name@alias. With --to, MLflow copies the version first, once: for
    teams with a registered model for each environment.
    """
    from diffdefend_core.stages.gatekeeper import Gatekeeper

    answer, moved = Gatekeeper(current_settings()).promote(source, alias, to=to)
    if output == "json":
        click.echo(json.dumps({"moved": moved, "alias": alias, **answer.to_dict()}, indent=2))
    elif moved:
        copied = f", a copy of {answer.origin}" if answer.origin is not None else ""
        click.echo(f"yes  @{alias} points at {answer.version}{copied}")
    else:
        _print(answer)
    return EXIT_PASS if moved else EXIT_FAIL


@click.group()
def policy() -> None:
    """The rules that a model must pass, as a file."""


@policy.command("check", epilog=_CODES.format(yes="the policy can be used", no="it has mistakes; each is a line"))
@click.argument("file", metavar="FILE")
@FORMAT
@shared
def check_policy(file: str, output: str) -> int:
    """Find all mistakes in a policy file, each with its dotted path."""
    from diffdefend_core.gate.policy import Mistakes, parse_policy
    from diffdefend_core.stages.policies import read_text, remarks

    digest, lines, notes = None, [], []
    try:
        read = parse_policy(read_text(file))
        digest, notes = read.digest(), remarks(read)
    except Mistakes as error:
        lines = list(error.lines)
    if output == "json":
        click.echo(json.dumps({"file": file, "digest": digest, "mistakes": lines, "remarks": notes}, indent=2))
    else:
        for line in lines or [*notes, f"ok, policy digest {digest}"]:
            click.echo(line)
    return EXIT_FAIL if lines else EXIT_PASS


@policy.command()
@click.argument("file", metavar="[FILE]", required=False)
@FORMAT
@shared
def explain(file: str | None, output: str) -> None:
    """Say in words what a policy asks: that of FILE, or the one that holds here (gate.policy)."""
    import dataclasses

    from diffdefend_core.stages.policies import explained, read_policy

    settings = current_settings()
    if file is not None:
        settings = settings.model_copy(update={"gate": dataclasses.replace(settings.gate, policy=file)})
    document = explained(read_policy(settings))
    if output == "json":
        click.echo(json.dumps(document, indent=2))
        return
    from diffdefend_core.report.table import plain_table

    click.echo(f"policy digest {document['digest']}")
    print_table(plain_table(document["rules"]))
    if document["waivers"]:
        print_table(plain_table(document["waivers"]))


@click.group()
def key() -> None:
    """The keys that sign decisions."""


@key.command()
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Where the files go.")
@FORMAT
@shared
def generate(to: Path, output: str) -> None:
    """Make a new Ed25519 key: a private file that only its owner may read, and a public one.

    Prints the key id and the public part; the private part is never printed.
    """
    from diffdefend_core.stages.keys import write_key

    made = write_key(to)
    if output == "json":
        click.echo(json.dumps(made, indent=2))
        return
    for name in ("key_id", "private_file", "public_file"):
        click.echo(f"{name.replace('_', ' ')}: {made[name]}")
    click.echo(made["public_key"], nl=False)


def _show(checks: Sequence[Check], output: str) -> None:
    if output == "json":
        document: dict[str, Any] = {"holds": all(item.holds for item in checks)}
        click.echo(json.dumps({**document, "checks": [item.to_dict() for item in checks]}, indent=2))
        return
    for item in checks:
        _print(item)


def _print(item: Check) -> None:
    from diffdefend_core.report.text import printable

    more = [item.version] if item.version not in (None, item.source) else []
    more += [f"a copy of {item.origin}"] if item.origin is not None else []
    name = f"{item.source} ({', '.join(map(str, more))})" if more else item.source
    if item.holds and item.predicate is not None:
        click.echo(printable(f"yes  {name}: the decision holds until {item.predicate.expires}"))
    for reason in item.reasons:
        click.echo(printable(f"no   {name}: {reason.text}"))
