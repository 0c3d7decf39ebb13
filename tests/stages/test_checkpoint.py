"""The state of a training in the store: whole, verified, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffdefend_core.stages.checkpoint import Checkpoint

STATE = {"weight/0": torch.arange(6.0).view(2, 3), "generator": torch.get_rng_state(), "done": torch.tensor(3)}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(f"file://{tmp_path}/store/", "key")
    assert checkpoint.read() is None
    for state in (STATE, {**STATE, "done": torch.tensor(6)}):
        checkpoint.write(state)
        found = checkpoint.read()
        assert found is not None and found.keys() == state.keys()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items()
        )
    assert Checkpoint(f"file://{tmp_path}/store", "another").read() is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_a_damaged_state_is_none_and_says_so(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(f"file://{tmp_path}", "key")
    checkpoint.write(STATE)
    path = tmp_path / "checkpoints" / "key.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "text": b"hello"}[damage])
    assert checkpoint.read() is None
    assert "starts anew" in capsys.readouterr().err
