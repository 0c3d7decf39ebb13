"""Weights from outside: nothing is read before its digest is the pinned one, and nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffdefend_core.errors import InputError
from diffdefend_core.evaluation.weights import check_sha256, read_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def checkpoint(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [save(TENSORS), checkpoint(TENSORS)], ids=["safetensors", "checkpoint"])
def test_both_formats_are_read(content: bytes) -> None:
    found = read_weights(content, "it")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)


class Harmful:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "harm"
    for content in (checkpoint({"a": Harmful(path)}), pickle.dumps(Harmful(path))):
        with pytest.raises(InputError, match="weights of it cannot be read") as caught:
            read_weights(content, "it")
        assert "\n" not in str(caught.value)
    assert not path.exists()
    pickle.loads(pickle.dumps(Harmful(path)))
    assert path.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 torn", save(TENSORS)[:-3], checkpoint([1, 2]), checkpoint({"a": 1}), b"\x80junk"]
)
def test_what_is_no_named_tensors_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="weights of it cannot be read") as caught:
        read_weights(content, "it")
    assert "\n" not in str(caught.value)


def test_another_digest_is_refused_with_both() -> None:
    digest = hashlib.sha256(b"content").hexdigest()
    assert check_sha256(b"content", digest.upper(), "it", "mend it") == digest
    with pytest.raises(InputError, match=f"weights of it have sha256 {digest}; expected {'0' * 64}; mend it"):
        check_sha256(b"content", "0" * 64, "it", "mend it")
