"""Exit codes of the commands, and the words about them in the help."""

from __future__ import annotations

EXIT_PASS, EXIT_FAIL, EXIT_ERROR, EXIT_INCONCLUSIVE, EXIT_TERMINATED = 0, 1, 2, 3, 143

EXIT_CODES_HELP = """\b
Exit codes:
  0  pass: the model is clean
  1  backdoored, or the gate's policy failed
  2  the tool failed or was misused
  3  inconclusive
  143  ended by SIGTERM; run it again to go on
Commands of a single stage exit 0 whatever the verdict: in a pipeline a backdoor is a normal result.
"""
