"""The group of all commands, and how one is run: errors become one line and an exit code."""

from __future__ import annotations

import sys
import traceback

import click

from diffdefend_core import __version__
from diffdefend_core.cli import cluster, gate, inspection, models, platform, registry, scan, stages
from diffdefend_core.cli.exit_codes import EXIT_CODES_HELP, EXIT_ERROR, EXIT_PASS, EXIT_TERMINATED
from diffdefend_core.cli.failures import Terminated, explained, raise_at_sigterm, redacted
from diffdefend_core.cli.options import shared
from diffdefend_core.errors import DiffDefendError, MissingExtraError
from diffdefend_core.report.text import printable

ERROR_PREFIX = "diffdefend: error: "

_ALIASES = {"invert": "invert-trigger"}
_EXTRAS = {
    "torch": "torch", "diffusers": "torch", "safetensors": "torch", "kfp": "pipelines", "docker": "pipelines",
    "kfp_server_api": "pipelines", "mlflow": "registry", "minio": "s3", "tenacity": "s3",
    "huggingface_hub": "hub", "picklescan": "pickles", "jinja2": "report", "matplotlib": "report",
    "starlette": "webhook", "uvicorn": "webhook", "prometheus_client": "webhook",
    "securesystemslib": "signing", "cryptography": "signing",
}  # fmt: skip


class _Group(click.Group):
    """Commands with aliases that the help does not list."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))


@click.group(
    cls=_Group, epilog=EXIT_CODES_HELP, context_settings={"help_option_names": ["-h", "--help"]},
    commands=[
        stages.load, stages.invert_trigger, stages.detect, stages.keep, stages.purify, stages.quarantine,
        stages.evaluate, stages.register,
        scan.scan, scan.run, inspection.inspect,
        models.check_input, models.calibrate, models.list_kind, models.attack,
        gate.gate, gate.policy, gate.key,
        cluster.submit, cluster.schedule, registry.scan_registry, registry.serve_webhook,
        platform.compile_command, platform.config, platform.doctor,
    ],
)  # fmt: skip
@click.version_option(__version__, prog_name="diffdefend")
@shared
def cli() -> None:
    """Keep backdoored diffusion models out of production."""


def main() -> None:
    """Run the command line and exit with its code."""
    raise_at_sigterm()
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
        return _fail(str(_missing(str(error.name), extra)) if extra else explained(error), arguments)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; finished stages are kept, run it again to go on (--verbose shows where)", arguments)
    except Terminated:
        return _fail("terminated (SIGTERM); finished stages are kept, run it again to go on", code=EXIT_TERMINATED)
    except Exception as error:
        return _fail(explained(error), arguments)


def _missing(library: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"{library} is not installed", expected=f"the extra [{extra}]", action=f"pip install 'diffdefend[{extra}]'"
    )


def _fail(message: str, arguments: list[str] | None = None, *, hint: str = "", code: int = EXIT_ERROR) -> int:
    if "--verbose" in (arguments or []):
        sys.stderr.write(redacted(traceback.format_exc()))
    sys.stderr.write(f"{ERROR_PREFIX}{printable(redacted(' '.join(message.split())))}{hint}\n")
    return code
