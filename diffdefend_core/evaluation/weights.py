"""Weights that the user provides: compared with a pinned sha256 before anything reads them."""

from __future__ import annotations

import hashlib
import io
import pickle

import torch
from torch import Tensor

from diffdefend_core.errors import InputError, MissingExtraError


def check_sha256(content: bytes, pinned: str, what: str, action: str) -> str:
    """Return the sha256 (hex) of the content. Raises InputError that names both unless it is the pinned one."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != pinned.lower():
        raise InputError(f"weights of {what} have sha256 {digest}", expected=pinned, action=action)
    return digest


def read_weights(content: bytes, what: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a torch checkpoint, which may hold nothing but tensors.

    Raises InputError for anything else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if content[8:9] == b"{":  # the header of a safetensors file follows its length
            return dict(load(content))
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise _unreadable(what, " ".join(str(error).split())[:120]) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        # torch's own message advises to unpickle what cannot be read otherwise
        raise _unreadable(what, "it is no torch checkpoint, or holds more than tensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise _unreadable(what, "it holds more than named tensors")
    return tensors


def missing(library: str, error: ImportError | RuntimeError, remedy: str) -> MissingExtraError:
    """Return the error for a library of the extra `perceptual` that is absent or cannot start.

    Without a torchvision that was built for the torch that is there, the import fails with a RuntimeError.
    """
    absent = isinstance(error, ImportError)
    return MissingExtraError(
        f"{library} {'is not installed' if absent else 'does not start: torchvision is built for another torch'}",
        expected=f"{library}, and a torchvision that is built for this torch",
        action=f"pip install 'diffdefend[perceptual]' from the index that torch came from, or {remedy}",
    )


def _unreadable(what: str, reason: str) -> InputError:
    return InputError(
        f"weights of {what} cannot be read ({reason})",
        expected="a safetensors file or a torch checkpoint of named tensors",
        action="give the published file",
    )
