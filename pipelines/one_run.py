"""One run of the gate in a process of its own: `python -m pipelines.one_run`, as `local_runs` starts it.

The first line of stdin is JSON with `source` and `settings`; the last line of stdout is JSON with `result` or `error`.
When stdin closes, whoever started the run is gone: then the run and its stages end too, so that a restarted scan does
not meet a second run of the same version.
"""

import json
import os
import signal
import sys
import threading

from diffdefend_core.config import Settings
from diffdefend_core.errors import DiffDefendError


def main() -> int:
    """Run the gate for the request on stdin and return the exit code: 0 if it decided."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        from pipelines.local import run_gate

        settings = Settings(**request["settings"])
        answer = {"result": run_gate(request["source"], settings, quiet=request["quiet"], verbose=request["verbose"])}
    except DiffDefendError as error:
        answer = {"error": " ".join(str(error).split())}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0 if "result" in answer else 2


def _end_with_the_parent() -> None:
    while sys.stdin.read(1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread sits in a read of stdin, which a normal exit would wait for
