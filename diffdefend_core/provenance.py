"""Which code made an artifact, and digests of plain values. Standard library only."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from diffdefend_core import __version__


@functools.cache
def code_version() -> str:
    """Return the version and a digest of the package's own sources: changed code never reuses old results."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a plain JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
