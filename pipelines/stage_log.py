"""What the stages of a run on this machine say, and the word for how one ended that said nothing."""

import signal
import sys
from dataclasses import dataclass, field

ERROR_PREFIX = "diffdefend: error: "


@dataclass(kw_only=True)
class StageLog:
    """What the stages say: passed on to stderr, but for their error lines, the last of which is kept."""

    quiet: bool = False
    verbose: bool = False
    error: str = ""
    _rest: str = field(default="", repr=False)

    def flags(self) -> list[str]:
        """Return what a stage is told about its own log."""
        return ["--verbose"] * self.verbose + ["--quiet"] * self.quiet

    def line(self, text: str) -> None:
        """Take one line that a stage wrote to its stderr."""
        if text.strip().startswith(ERROR_PREFIX):
            self.error = text.strip().removeprefix(ERROR_PREFIX)
        elif not self.quiet:
            sys.stderr.write(f"{text.rstrip()}\n")

    def write(self, text: str) -> int:
        """Take what kfp.local prints to stdout: its own chatter, shown with `verbose` only."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self.verbose or line.strip().startswith(ERROR_PREFIX):
                self.line(line.removeprefix("    "))
        return len(text)

    def flush(self) -> None:
        """Do nothing: lines are passed on as they end."""

    def ended(self, stage: str, code: int) -> None:
        """Take the exit code of a stage, negative for a signal; without a line of its own, say how it ended."""
        if code and not self.error:
            self.error = f"stage {stage} {_ending(code)}"


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), which the kernel does when the memory is used up; expected room for the model and "
            "its batches; use a larger machine, and run it again: finished stages are kept"
        )
    return f"ended with code {code} and without a message"
