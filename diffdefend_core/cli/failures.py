"""What a command says of errors that nobody raised on purpose, and how SIGTERM ends it."""

from __future__ import annotations

import errno
import os
import re
import signal
from types import FrameType

SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN",
    "DIFFDEFEND_SIGNING_KEY",
)  # fmt: skip
SHORTEST_SECRET = 6  # shorter ones are words of ordinary text
_PASSWORD = re.compile(r"//[^/@\s]+@")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """Raised in the main thread at SIGTERM: all that is open is closed and temporary folders are removed."""


def raise_at_sigterm() -> None:
    """Let the first SIGTERM raise Terminated; later ones do not disturb the clearing up."""
    signal.signal(signal.SIGTERM, _terminate)


def explained(error: BaseException) -> str:
    """Return the line for an error that no part of DiffDefend raised on purpose."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"the disk is full ({error.filename or error.strerror}); expected room for temporary files and the store; "
            "make room, or name another place with TMPDIR, and run it again"
        )
    # torch raises RuntimeError and classes of its own
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return (
            "the memory is used up; expected room for the model and its batches; use a larger machine or smaller "
            "batches, and run it again: finished stages are kept"
        )
    return f"unexpected {type(error).__name__}: {error} (--verbose shows where)"


def redacted(text: str) -> str:
    """Return the text without the secrets of the environment and without passwords in URLs.

    Our own messages hold none. The traceback that `--verbose` prints quotes those of libraries, which may.
    """
    for secret in (os.environ.get(name, "") for name in SECRETS):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _PASSWORD.sub("//***@", text)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
