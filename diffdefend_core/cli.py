"""The command line: it parses, calls one stage and prints; results go to stdout, everything else to stderr.

Libraries that take long to import are imported inside the commands. `run` and `compile` import the top-level package
`pipelines`, the one exception to "the core knows no pipelines": without kfp all other commands still work.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import click

from diffdefend_core import __version__
from diffdefend_core.config import Settings, load_settings, merge_flags, parse_assignment, without_password
from diffdefend_core.errors import DiffDefendError, MissingExtraError
from diffdefend_core.progress import Progress, reporting

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_PASS, EXIT_FAIL, EXIT_ERROR, EXIT_INCONCLUSIVE = 0, 1, 2, 3
ERROR_PREFIX = "diffdefend: error: "

_VERDICT_CODES = {"clean": EXIT_PASS, "backdoored": EXIT_FAIL}
_ALIASES = {"invert": "invert-trigger"}
_FLAGS = ("store", "tracking_uri", "device", "seed", "adapter")
_EXTRAS = {
    "torch": "torch", "diffusers": "torch", "safetensors": "torch", "kfp": "pipelines", "docker": "pipelines",
    "mlflow": "registry", "minio": "s3", "tenacity": "s3", "jinja2": "report", "matplotlib": "report",
}  # fmt: skip
_EXIT_CODES = """\b
Exit codes:
  0  pass: the model is clean
  1  backdoored, or the gate's policy failed
  2  the tool failed or was misused
  3  inconclusive
Commands of a single stage exit 0 whatever the verdict: in a pipeline a backdoor is a normal result.
"""
_CHECK_CODES = """\b
Exit codes:
  0  no row is flagged
  1  a row is flagged
  2  the tool failed or was misused
"""


class _Group(click.Group):
    """Commands with aliases that the help does not list."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a global flag, given before or after the command; the later place wins, `--set` adds up."""
    flags: dict[str, Any] = ctx.ensure_object(dict)
    if param.name == "set":
        flags.setdefault("set", []).extend(value)
    elif value is not None and value is not False:
        flags[str(param.name)] = value


def _shared(command: Command) -> Command:
    """Add the global flags to a command."""
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


_WRITTEN = click.Path(path_type=Path)
_MODEL = click.option("--model", "model_uri", required=True, metavar="URI", help="Folder of the load stage.")
_TRIGGER = click.option("--trigger", "trigger_uri", required=True, metavar="URI", help="Folder of invert-trigger.")
_VERDICT = click.option("--verdict", "verdict_uri", required=True, metavar="URI", help="Folder of detect.")
_NAME = click.option("--name", metavar="NAME", help="Name of the model in reports and registry.")
_FORMAT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


def _stage(command: Command) -> Command:
    """Add what every command of a single stage takes."""
    science = click.option("--settings", "science", metavar="JSON", help="Seed and options, as a pipeline hands them.")
    written = click.option("--uri-output", type=_WRITTEN, metavar="FILE", help="Also write the URI to this file.")
    return _shared(science(written(command)))


@click.group(cls=_Group, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffdefend")
@_shared
def cli() -> None:
    """Keep backdoored diffusion models out of production."""


@cli.command()
@click.option("--source", required=True, metavar="URI", help="Folder, s3://, file:// or models:/ URI of the model.")
@_NAME
@_stage
def load(source: str, name: str | None, science: str | None, uri_output: Path | None) -> None:
    """Fetch a model and refuse what may not be loaded."""
    from diffdefend_core.stages import load as stage

    _hand_over(stage.load(source, settings=_settings(science), name=name or None), uri_output)


@cli.command("invert-trigger")
@_MODEL
@_stage
def invert_trigger(model_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Search the trigger that a backdoored model would answer to (also: invert)."""
    from diffdefend_core.stages import invert_trigger as stage

    with _progress() as progress:
        uri = stage.invert_trigger(model_uri, settings=_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@cli.command()
@_MODEL
@_TRIGGER
@click.option("--word-output", type=_WRITTEN, metavar="FILE", help="Also write the verdict's word to this file.")
@_stage
def detect(
    model_uri: str, trigger_uri: str, word_output: Path | None, science: str | None, uri_output: Path | None
) -> None:
    """Say whether a model carries a backdoor."""
    from diffdefend_core.artifacts import Verdict
    from diffdefend_core.stages import detect as stage
    from diffdefend_core.stages.folder import read_record

    with _progress() as progress:
        uri = stage.detect(model_uri, trigger_uri, settings=_settings(science), progress=progress)
    if word_output:
        _write(word_output, read_record(Verdict, uri, "verdict").word.value)
    _hand_over(uri, uri_output)


@cli.command()
@_MODEL
@_TRIGGER
@_VERDICT
@_stage
def keep(model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Pass a clean model on as it is."""
    from diffdefend_core.stages import keep as stage

    _hand_over(stage.keep(model_uri, trigger_uri, verdict_uri, settings=_settings(science)), uri_output)


@cli.command()
@_MODEL
@_TRIGGER
@_VERDICT
@_stage
def purify(model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Remove the backdoor and scan the repaired model again."""
    from diffdefend_core.stages import purify as stage

    with _progress() as progress:
        uri = stage.purify(model_uri, trigger_uri, verdict_uri, settings=_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@cli.command()
@_MODEL
@_TRIGGER
@_VERDICT
@_stage
def quarantine(
    model_uri: str, trigger_uri: str, verdict_uri: str, science: str | None, uri_output: Path | None
) -> None:
    """Set a model aside whose verdict is inconclusive."""
    from diffdefend_core.stages import quarantine as stage

    _hand_over(stage.quarantine(model_uri, trigger_uri, verdict_uri, settings=_settings(science)), uri_output)


@cli.command()
@click.option("--candidate", "candidate_uri", required=True, metavar="URI", help="Folder of keep, purify, quarantine.")
@_stage
def evaluate(candidate_uri: str, science: str | None, uri_output: Path | None) -> None:
    """Measure quality and attack success, before and after repair."""
    from diffdefend_core.stages import evaluate as stage

    with _progress() as progress:
        uri = stage.evaluate(candidate_uri, settings=_settings(science), progress=progress)
    _hand_over(uri, uri_output)


@cli.command()
@click.option("--candidate", "candidate_uri", required=True, metavar="URI", help="Folder of keep, purify, quarantine.")
@click.option("--scorecard", "scorecard_uri", required=True, metavar="URI", help="Folder of evaluate.")
@_NAME
@click.option("--outcome-output", type=_WRITTEN, metavar="FILE", help="Also write the outcome's word to this file.")
@click.option("--report-output", type=_WRITTEN, metavar="FILE", help="Also write the HTML report to this file.")
@click.option("--metrics-output", type=_WRITTEN, metavar="FILE", help="Also write the measured values to this file.")
@click.option("--executor-input", metavar="JSON", help="What KFP tells its steps; shows report and metrics there.")
@_stage
def register(
    candidate_uri: str, scorecard_uri: str, name: str | None, outcome_output: Path | None, report_output: Path | None,
    metrics_output: Path | None, executor_input: str | None, science: str | None, uri_output: Path | None,
) -> None:  # fmt: skip
    """Apply the gate's rules and tell the model registry."""
    from diffdefend_core.stages import register as stage
    from diffdefend_core.stages import shown

    uri = stage.register(candidate_uri, scorecard_uri, settings=_settings(science), name=name or None)
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


@cli.command(epilog=_EXIT_CODES)
@click.argument("source", metavar="MODEL_URI")
@_NAME
@_FORMAT
@_shared
def scan(source: str, name: str | None, output: str) -> int:
    """Load, invert and detect in one go: is this model backdoored?"""
    from diffdefend_core.report.scan_document import scan_document
    from diffdefend_core.report.table import verdict_table
    from diffdefend_core.stages import scan as stage

    settings, began = _settings(), time.monotonic()
    with _progress() as progress:
        uris = stage.scan(source, settings=settings, name=name, progress=progress)
    model, _, verdict = stage.read(*uris)
    document = scan_document(
        model, verdict, uris=dict(zip(("model_uri", "trigger_uri", "verdict_uri"), uris, strict=True)),
        config_digest=settings.digest(), seconds=time.monotonic() - began,
    )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(document, indent=2, sort_keys=True, allow_nan=False))
    else:
        _print_table(verdict_table(model, verdict))
    return _VERDICT_CODES.get(verdict.word.value, EXIT_INCONCLUSIVE)


@cli.command(epilog=_EXIT_CODES)
@click.argument("source", metavar="MODEL_URI")
@_NAME
@click.option("--docker", is_flag=True, help="Run the stages in containers.")
@_FORMAT
@_shared
def run(source: str, name: str | None, docker: bool, output: str) -> int:
    """Run the whole gate on this machine: scan, repair, evaluate, register.

    Exits 0 only if the model itself was promoted. A repaired model gets its own version in the registry, yet the exit
    code is 1: the model that was given is backdoored.
    """
    from diffdefend_core.report.table import summary_table
    from diffdefend_core.stages.shown import summary
    from pipelines.local import run_gate

    flags = click.get_current_context().ensure_object(dict)
    result = run_gate(
        source, _settings(), name=name or "", docker=docker,
        quiet=flags.get("quiet", False), verbose=flags.get("verbose", False),
    )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(result, indent=2, sort_keys=True, allow_nan=False))
    else:
        _print_table(summary_table([summary(result["gate_uri"], result["scorecard_uri"], result["candidate_uri"])]))
        click.echo(f"report: {result['gate_uri']}report.html")
    if result["outcome"] == "promoted":
        return EXIT_PASS
    return EXIT_INCONCLUSIVE if result["word"] == "inconclusive" else EXIT_FAIL


@cli.command("check-input", epilog=_CHECK_CODES)
@click.argument("noise", metavar="NOISE")
@click.option("--trigger", "trigger_uri", metavar="URI", help="File with `trigger`, or folder of invert-trigger.")
@click.option("--model", "model_uri", metavar="MODEL_URI", help="Also ask this model (UFID), which takes long.")
@click.option("--sampler", metavar="NAME", help="What the model paints with [default: its usual one].")
@click.option(
    "--false-positive-rate", "rate", default=0.001, show_default=True, metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Share of clean noise that each check may flag.",
)  # fmt: skip
@_FORMAT
@_shared
def check_input(
    noise: str, trigger_uri: str | None, model_uri: str | None, sampler: str | None, rate: float, output: str
) -> int:
    """Say whether initial noise carries a trigger.

    NOISE is a .npy file, or a safetensors file with `noise`: [C, H, W] or [N, C, H, W], in units of the initial noise.
    """
    from diffdefend_core.report.table import plain_table
    from diffdefend_core.stages import check_input as stage

    with _progress() as progress:
        document = stage.check_input(
            noise, settings=_settings(), trigger_uri=trigger_uri or "", model_uri=model_uri or "",
            sampler=sampler or "", false_positive_rate=rate, progress=progress,
        )  # fmt: skip
    if output == "json":
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        _print_table(plain_table(stage.table_rows(document)))
    return EXIT_FAIL if document["flagged"] else EXIT_PASS


@cli.command()
@click.argument("sources", metavar="MODEL_URI...", nargs=-1, required=True)
@click.option("--name", required=True, metavar="NAME", help="Name of the calibration in results.")
@_FORMAT
@_shared
def calibrate(sources: tuple[str, ...], name: str, output: str) -> None:
    """Measure clean models of one family and shape: what is ordinary for `detection.calibration`.

    Prints the URI of the calibration and what it says of each of its own models when that one is left out.
    """
    from diffdefend_core.detection import Calibration
    from diffdefend_core.stages import calibrate as stage
    from diffdefend_core.stages.folder import read_record

    settings = _settings()
    with _progress() as progress:
        uri = stage.calibrate(sources, name=name, settings=settings, progress=progress)
    calibration = read_record(Calibration, uri, "calibration")
    rows: list[dict[str, Any]] = [
        {"model": item.name, "verdict": item.word.value, "probability": round(item.probability, 3)}
        for item in stage.held_out(calibration, settings.detection.limit)
    ]
    if output == "json":
        click.echo(json.dumps({"uri": uri, "digest": calibration.digest(), "held_out": rows}, indent=2))
        return
    from diffdefend_core.report.table import plain_table

    _print_table(plain_table(rows))
    click.echo(uri)


@cli.command("list")
@click.argument("kind", type=click.Choice(["families", "samplers", "attacks", "methods"]))
@_FORMAT
@_shared
def list_kind(kind: str, output: str) -> None:
    """Print what is there: families, samplers, attacks or methods."""
    from diffdefend_core.stages.catalogue import KINDS

    rows = KINDS[kind]()
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    from diffdefend_core.report.table import plain_table

    _print_table(plain_table(rows))


@cli.command()
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
@_FORMAT
@_shared
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
    with _progress() as progress:
        card = stage.attack(source, to, options, settings=_settings(), data=data, progress=progress)
    if output == "json":
        click.echo(json.dumps(card, indent=2))
        return
    success = f", attack success {card['asr']:.0%} (before: {card['asr_before']:.0%})" if "asr" in card else ""
    click.echo(f"{method} planted in {to / 'model'}, fires with {card['sampler']}{success}")


@cli.command("compile")
@click.option("-o", "--output", type=_WRITTEN, required=True, metavar="FILE", help="Where the YAML goes.")
@click.option("--gpu", is_flag=True, help="Ask for an accelerator for the stages that compute.")
@_shared
def compile_pipeline(output: Path, gpu: bool) -> None:
    """Compile the gate for Kubeflow Pipelines, with the seed and the options that hold here as its default settings."""
    from pipelines.compile import compile_gate

    compile_gate(output, science=_settings().science_json(), gpu=gpu)
    click.echo(str(output))


@cli.group()
def config() -> None:
    """The settings."""


@config.command()
@_FORMAT
@_shared
def show(output: str) -> None:
    """Print the settings that hold here, after flags, environment and file."""
    settings = _settings()
    plain = settings.model_dump(mode="json")
    plain["tracking_uri"] = without_password(settings.tracking_uri)
    plain["config_digest"] = settings.digest()
    if output == "json":
        click.echo(json.dumps(plain, indent=2, sort_keys=True))
        return
    import yaml

    click.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)


@cli.command()
@_FORMAT
@_shared
def doctor(output: str) -> None:
    """Say which optional parts are present."""
    from diffdefend_core.doctor import examine

    checks = examine(_settings())
    if output == "json":
        click.echo(json.dumps({name: {"present": ok, "remark": remark} for name, ok, remark in checks}, indent=2))
        return
    for name, ok, remark in checks:
        click.echo(f"{'ok' if ok else 'no':3}{name:16}{remark}")


def _settings(science: str | None = None) -> Settings:
    """Return the settings of the current command; an empty flag is one that was not given."""
    flags = click.get_current_context().ensure_object(dict)
    given = {name: flags[name] for name in _FLAGS if flags.get(name)}
    given = merge_flags(given, *(parse_assignment(text) for text in flags.get("set", [])))
    if science:
        return Settings.from_science(science, flags.get("config"), **given)
    return load_settings(flags.get("config"), **given)


def _progress() -> AbstractContextManager[Progress | None]:
    flags = click.get_current_context().ensure_object(dict)
    _start_logging(flags)
    return reporting(quiet=flags.get("quiet", False), color=not flags.get("no_color", False))


def _start_logging(flags: dict[str, Any]) -> None:
    level = logging.ERROR if flags.get("quiet") else logging.DEBUG if flags.get("verbose") else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("diffdefend_core").setLevel(level)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _hand_over(uri: str, uri_output: Path | None) -> None:
    if uri_output:
        _write(uri_output, uri)
    click.echo(uri)


def _print_table(table: object) -> None:
    """Print a table to stdout: in colour on a terminal, and not cut to 80 columns elsewhere."""
    from rich.console import Console

    flags = click.get_current_context().ensure_object(dict)
    width = None if sys.stdout.isatty() else 160
    Console(no_color=flags.get("no_color", False) or None, width=width).print(table)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors become one line on stderr and code 2."""
    try:
        code = cli.main(arguments, prog_name="diffdefend", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_PASS
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_ERROR
    except click.ClickException as error:
        return _fail(error.format_message().rstrip("."), hint="; see `--help`")
    except DiffDefendError as error:
        return _fail(str(error), arguments)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        return _fail(str(_missing(str(error.name), extra)) if extra else _unexpected(error), arguments)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; finished stages are kept, run it again to go on (--verbose shows where)", arguments)
    except Exception as error:
        return _fail(_unexpected(error), arguments)


def _missing(library: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"{library} is not installed", expected=f"the extra [{extra}]", action=f"pip install 'diffdefend[{extra}]'"
    )


def _unexpected(error: BaseException) -> str:
    return f"unexpected {type(error).__name__}: {error} (--verbose shows where)"


def _fail(message: str, arguments: list[str] | None = None, *, hint: str = "") -> int:
    if "--verbose" in (arguments or []):
        traceback.print_exc(file=sys.stderr)
    sys.stderr.write(f"{ERROR_PREFIX}{' '.join(message.split())}{hint}\n")
    return EXIT_ERROR
