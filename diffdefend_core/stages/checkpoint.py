"""The state of a long training in the store, so that a killed stage goes on where it was and not from the start.

It is one object that is overwritten, next to the stage folders and no part of any: what it holds is verified by its own
digest, and a training that went on from it is scanned again like any other.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdefend_core.io.store import MissingObjectError, open_store

FOLDER = "checkpoints"


class Checkpoint:
    """Tensors by name under one key of the store."""

    def __init__(self, store: str, key: str) -> None:
        self.store, prefix = open_store(f"{store.rstrip('/')}/{FOLDER}/")
        self.key = f"{prefix}{key}.safetensors"

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state instead of the one before, whole or not at all. Raises StoreError."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        with tempfile.TemporaryDirectory(prefix="diffdefend-checkpoint-") as folder:
            path = Path(folder) / "state.safetensors"
            save_file(tensors, path, metadata={"sha256": _digest(tensors)})
            self.store.put(self.key, path)

    def read(self) -> dict[str, Tensor] | None:
        """Return the state that was kept, or None if there is none or it is damaged. Raises StoreError."""
        with tempfile.TemporaryDirectory(prefix="diffdefend-checkpoint-") as folder:
            path = Path(folder) / "state.safetensors"
            try:
                with path.open("wb") as file:
                    file.writelines(self.store.read(self.key))
                with safe_open(path, framework="pt") as opened:
                    tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
                    wanted = (opened.metadata() or {}).get("sha256")
            except MissingObjectError:
                return None
            except (SafetensorError, ValueError):
                tensors, wanted = {}, None
        if not tensors or _digest(tensors) != wanted:
            self.dismiss("it is damaged")
            return None
        return tensors

    def dismiss(self, reason: str) -> None:
        """Say on stderr why the state is of no use."""
        print(f"the checkpoint {self.key} is not used ({reason}): the training starts anew", file=sys.stderr)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()
