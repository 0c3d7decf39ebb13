"""A script for a process of its own: weights from a checked torch archive into a safetensors file.

    python -I unpickle.py ARCHIVE TARGET

It knows nothing of the rest of DiffDefend, gets no environment worth stealing, and limits its own memory, time and
output before it opens the file. Whatever is wrong ends it with code 1 and one line on stderr.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import torch
from safetensors.torch import save_file

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SECONDS = 300
SPARE_BYTES = 500 << 20


def limit(size: int) -> None:
    """Limit memory to three times the archive of `size` bytes plus 500 MB, time, and what may be written."""
    with open("/proc/self/statm", encoding="ascii") as file:
        standing = int(file.read().split()[0]) * resource.getpagesize()
    memory = standing + 3 * size + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (1 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read(archive: str, size: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a flat dictionary. Raises ValueError when it holds anything else, or more than `size`."""
    state: Any = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"it holds a {type(state).__name__} and no dictionary of tensors")
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name!r} is a {type(tensor).__name__} and no plain tensor"[:200])
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name!r} is of {tensor.dtype}"[:200])
        # a view of one number may claim any shape: written out it would fill the disk
        total += tensor.numel() * tensor.element_size()
        if total > size:
            raise ValueError("its tensors are larger than the file")
    return {name: state[name].detach().clone(memory_format=torch.contiguous_format) for name in sorted(state)}


def main(archive: str, target: str) -> int:
    """Write the tensors of `archive` to `target`; return the exit code."""
    size = os.path.getsize(archive)
    if sys.platform == "linux":
        limit(size)
    try:
        save_file(read(archive, size), target, metadata={"format": "pt"})
    except Exception as error:  # this is the whole program: hostile bytes may raise anything, and all of it refuses
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
