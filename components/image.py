"""Which image a stage runs in, and how its command line begins: the one place for both."""

import os

from diffdefend_core import __version__

COMMAND = ["python3", "-m", "diffdefend_core"]


def image(target: str) -> str:
    """Return the image for `target`: `cpu` (no torch) or `gpu` (torch; runs on a CPU too).

    `DIFFDEFEND_IMAGE`, read when the pipeline is compiled, names another one; `{target}` in it becomes the target.
    """
    return os.environ.get("DIFFDEFEND_IMAGE", f"diffdefend:{__version__}-{{target}}").replace("{target}", target)
