"""Stands in for a stage: takes the command line of a component, writes its outputs, computes nothing.

The URI that it writes tells which stages ran before it. STAND_IN_WORD is the verdict; STAND_IN_FAILS names a stage
that fails as ours do, STAND_IN_DIES one that ends without a word, STAND_IN_KILLED one that the kernel kills, and
STAND_IN_HANGS a file to which the first stage writes its process id before it waits. With STAND_IN_TELLS each says
which variables it has of the registry.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def write(name: str, text: str) -> None:
    path = Path(option(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


stage = sys.argv[1]
print(f"chatter of {stage} on stdout")
print(f"log of {stage} on {os.environ['DIFFDEFEND_DEVICE']}", file=sys.stderr)
if stage == os.environ.get("STAND_IN_FAILS"):
    print(f"diffdefend: error: {stage} found x; expected y; do z", file=sys.stderr)
    sys.exit(2)
if stage == os.environ.get("STAND_IN_DIES"):
    os.abort()
if stage == os.environ.get("STAND_IN_KILLED"):
    os.kill(os.getpid(), signal.SIGKILL)
if "STAND_IN_HANGS" in os.environ:
    Path(os.environ["STAND_IN_HANGS"]).write_text(str(os.getpid()))
    time.sleep(600)
if "STAND_IN_TELLS" in os.environ:
    held = {name: text for name, text in os.environ.items() if "TRACKING" in name}
    print(f"{stage} has {json.dumps(held, sort_keys=True)}", file=sys.stderr)
given = ("--source", "--candidate", "--verdict", "--trigger", "--model")
before = next(option(name) for name in given if name in sys.argv)
json.loads(option("--settings"))
write("--uri-output", f"{before}>{stage}")
if stage == "detect":
    write("--word-output", os.environ["STAND_IN_WORD"])
if stage == "register":
    write("--outcome-output", "promoted")
    write("--report-output", "<p>report</p>")
    write("--metrics-output", "{}")
