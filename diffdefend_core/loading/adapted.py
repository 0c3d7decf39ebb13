"""Models that an adapter builds: the contract is checked each time, and a repair is saved where that is possible."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.loading.adapters import CONTRACT, blaming, broken, call_adapter, describe
from diffdefend_core.loading.build import copy_files
from diffdefend_core.loading.static import Contents, inspect_contents
from diffdefend_core.loading.weights import match, write_weights

# how much of its own size an answer may move when another row of the batch changes
ROW_TOLERANCE = 1e-3


def load_adapted(folder: Path, adapter: str, device: str = "cpu") -> Denoiser:
    """Check the files of a folder, let an adapter build the model and return it, checked and frozen, on `device`.

    Raises InputError and ModelRejectedError as `inspect_contents` does, and InputError when the adapter cannot be
    imported, raises, or returns what does not keep the contract.
    """
    inspect_contents(folder)
    denoiser = call_adapter(adapter, folder, device)
    if not isinstance(denoiser, Denoiser):
        raise broken(adapter, f"returned an object of type {type(denoiser).__name__}", CONTRACT)
    _check_attributes(adapter, denoiser, device)
    denoiser.freeze()
    _check_answers(adapter, denoiser)
    return denoiser


def check_savable(denoiser: Denoiser, folder: Path) -> None:
    """Raise InputError unless the network's state has the names and shapes of the one weights file in `folder`."""
    _matched(denoiser, inspect_contents(folder))


def save_adapted(denoiser: Denoiser, source_folder: Path, target_folder: Path) -> Contents:
    """Write `denoiser`, made from the model in `source_folder`, as a folder of the same files; return what they hold.

    All files but the weights are copied; these keep the dtypes of the source. Raises as `check_savable`, and
    ModelRejectedError when weights are not finite.
    """
    source = inspect_contents(source_folder)
    weights, names = _matched(denoiser, source)
    copy_files(source, source_folder, target_folder, without=weights)
    write_weights(target_folder / weights, denoiser.network.state_dict(), names, source.tensors[weights])
    return inspect_contents(target_folder)


def _matched(denoiser: Denoiser, source: Contents) -> tuple[str, dict[str, str]]:
    """Return the path of the weights and {name in the network: name in the file}."""
    weights = next(iter(source.tensors))
    reason = "" if len(source.tensors) == 1 else f"it has {len(source.tensors)} weights files"
    if not reason:
        try:
            return weights, match(denoiser.network.state_dict(), source.tensors[weights])
        except ModelRejectedError as error:
            reason = error.found
    raise InputError(
        f"this model can be scanned but not repaired: {reason}",
        expected="one safetensors file with the names and shapes of the state of the adapter's network",
        action="store the weights as `network.state_dict()` gives them, or repair the model elsewhere",
    )


def _check_attributes(name: str, denoiser: Denoiser, device: str) -> None:
    describe(name, denoiser)
    if not isinstance(getattr(denoiser, "levels", None), Levels):
        raise broken(name, "returned a Denoiser without levels", "levels of class Levels")
    if not _is_range(getattr(denoiser, "value_range", None)):
        raise broken(name, "returned a Denoiser without an ordered value_range", "two finite numbers (low, high)")
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise broken(name, "returned a Denoiser without a network", "a torch module with parameters")
    if denoiser.device.type != torch.device(device).type:
        raise broken(name, f"put the network on {denoiser.device}", f"a network on {device}")


def _is_range(value: object) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    numbers = all(isinstance(side, int | float) and math.isfinite(side) for side in value)
    return numbers and value[0] < value[1]


def _check_answers(name: str, denoiser: Denoiser) -> None:
    """Ask for the noise of two rows at two levels, and once more with another second row."""
    t = torch.tensor([len(denoiser.levels) // 2, len(denoiser.levels) - 1], device=denoiser.device)
    generator = torch.Generator().manual_seed(0)
    eps, other = (torch.randn(2, *denoiser.shape, generator=generator).to(denoiser.device) for _ in range(2))
    _, sigma = denoiser.levels.at(t, eps)
    x = (sigma * eps).requires_grad_()
    changed = torch.stack((x.detach()[0], (sigma * other)[1]))
    with blaming(name, "returned a Denoiser that failed at its first answer"):
        first, second = denoiser.noise(x, t), denoiser.noise(changed, t)
    for answer in (first, second):
        _check_form(name, denoiser, x, answer)
    if not first.requires_grad:
        raise broken(name, "returned a Denoiser whose noise has no gradient", "noise that x can be searched through")
    moved = (first[0] - second[0]).abs().max().item()
    if moved > ROW_TOLERANCE * max(first[0].abs().max().item(), 1e-6):
        raise broken(name, "returned a Denoiser that mixes the rows of a batch", "rows that do not see each other")


def _check_form(name: str, denoiser: Denoiser, x: Tensor, answer: object) -> None:
    if not isinstance(answer, Tensor) or answer.shape != x.shape or answer.dtype != x.dtype:
        found = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise broken(name, f"returned a Denoiser whose noise is {found}", f"{x.dtype} {tuple(x.shape)}")
    if answer.device != x.device:
        raise broken(name, f"returned a Denoiser whose noise is on {answer.device}", f"noise on {x.device}")
    if not bool(torch.isfinite(answer).all()):
        raise broken(name, "returned a Denoiser whose noise is not finite", "finite answers to ordinary noise")
