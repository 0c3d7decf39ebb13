"""A lack of memory is one clear line, other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from diffdefend_core.errors import InputError
from diffdefend_core.stages.model import refusing_overflow


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_one_clear_line(error: Exception) -> None:
    with pytest.raises(InputError, match="memory is not enough"), refusing_overflow():
        raise error


def test_torch_itself_runs_out_of_memory_that_way() -> None:
    with pytest.raises(InputError, match="memory is not enough"), refusing_overflow():
        torch.empty(2**55)


def test_other_runtime_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shape"), refusing_overflow():
        raise RuntimeError("shape mismatch")
