"""The command line: it parses, calls one stage and prints; results go to stdout, everything else to stderr.

Libraries that take long to import are imported inside the commands. `run` and `compile` import the top-level package
`pipelines`, the one exception to "the core knows no pipelines": without kfp all other commands still work.
"""

from diffdefend_core.cli.group import cli, main, run_command

__all__ = ["cli", "main", "run_command"]
