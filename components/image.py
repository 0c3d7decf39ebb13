"""Which image a stage runs in, and how its command line begins: the one place for both."""

import os

from diffdefend_core import __version__

COMMAND = ["python3", "-m", "diffdefend_core"]


def image(target: str) -> str:
    """Return the image for `target`: `cpu` (no torch) or `gpu` (torch; runs on a CPU too).

    `DIFFDEFEND_IMAGE_CPU` and `DIFFDEFEND_IMAGE_GPU`, read when the pipeline is compiled, name another one, with its
    digest if wanted. `DIFFDEFEND_IMAGE` names both; `{target}` in it becomes the target.
    """
    default = os.environ.get("DIFFDEFEND_IMAGE") or f"diffdefend:{__version__}-{{target}}"
    return (os.environ.get(f"DIFFDEFEND_IMAGE_{target.upper()}") or default).replace("{target}", target)
