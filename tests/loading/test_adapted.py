"""What an adapter returns is checked when it is opened, and a repair is saved where that is possible."""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import SmallNetwork, vp_levels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.loading.adapted import check_savable, load_adapted, save_adapted

SHAPE = (1, 8, 8)
STEPS = 20
NAME = "adapted_under_test:load"


def model(network: nn.Module | None = None, **attributes: Any) -> DDPM:
    """Return a sound denoiser, with attributes changed."""
    denoiser = DDPM(network or SmallNetwork(1, STEPS), vp_levels(STEPS), shape=SHAPE, value_range=(0.0, 1.0))
    for name, value in attributes.items():
        setattr(denoiser, name, value)
    return denoiser


def read(folder: Path) -> DDPM:
    """Return the model whose weights lie in a folder."""
    network = SmallNetwork(1, STEPS)
    network.load_state_dict(load_file(folder / "network.safetensors"))
    return model(network)


@pytest.fixture
def adapt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Path, str], Any]], None]]:
    """Make a function the adapter called NAME."""
    module = types.ModuleType("adapted_under_test")
    monkeypatch.setitem(sys.modules, "adapted_under_test", module)
    yield lambda function: setattr(module, "load", function)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the weights of a network and a card."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(SmallNetwork(1, STEPS, seed=3).state_dict(), path / "network.safetensors")
    (path / "README.md").write_text("card")
    return path


def test_a_sound_model_is_opened_frozen(adapt: Any, folder: Path) -> None:
    adapt(lambda path, device: read(path))
    ours = load_adapted(folder, NAME)
    x, t = torch.randn(2, *SHAPE), torch.tensor([0, 5])
    torch.testing.assert_close(ours.noise(x, t), SmallNetwork(1, STEPS, seed=3)(x, t))
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())


class Wrong(SmallNetwork):
    """A network whose answer is changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(1, STEPS)
        self.change = change

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.change(super().forward(x, t))  # type: ignore[no-any-return]


def failing(answer: Tensor) -> Tensor:
    raise RuntimeError("sizes do not match\nat all")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda: None, "returned an object of type NoneType"),
        (lambda: SmallNetwork(1, STEPS), "returned an object of type SmallNetwork"),
        (lambda: model(shape=(8, 8)), "of shape"),
        (lambda: model(family=""), "the family ''"),
        (lambda: model(levels=None), "without levels"),
        (lambda: model(value_range=(1.0, 0.0)), "without an ordered value_range"),
        (lambda: model(value_range=(0.0, float("nan"))), "without an ordered value_range"),
        (lambda: model(nn.ReLU()), "without a network"),
        (lambda: model(shape=(2, 8, 8)), "failed at its first answer: RuntimeError: "),
        (lambda: model(Wrong(failing)), "failed at its first answer: RuntimeError: sizes do not match;"),
        (lambda: model(Wrong(lambda answer: answer[:, :, :4])), r"whose noise is torch.float32 \(2, 1, 4, 8\)"),
        (lambda: model(Wrong(lambda answer: answer.double())), "whose noise is torch.float64"),
        (lambda: model(Wrong(lambda answer: None)), "whose noise is NoneType"),
        (lambda: model(Wrong(lambda answer: answer * float("nan"))), "whose noise is not finite"),
        (lambda: model(Wrong(lambda answer: answer.detach())), "whose noise has no gradient"),
        (lambda: model(Wrong(lambda answer: answer - answer.mean(0))), "mixes the rows"),
        (lambda: model(Wrong(lambda answer: answer.to("meta"))), "whose noise is on meta"),
    ],
)
def test_what_breaks_the_contract_is_refused_in_one_line(adapt: Any, folder: Path, returned: Any, words: str) -> None:
    adapt(lambda path, device: returned())
    with pytest.raises(InputError, match=words) as caught:
        load_adapted(folder, NAME)
    assert "\n" not in str(caught.value) and NAME in str(caught.value)


def test_a_layer_that_looks_at_the_batch_only_in_training_passes(adapt: Any, folder: Path) -> None:
    class Normed(SmallNetwork):
        def __init__(self) -> None:
            super().__init__(1, STEPS)
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.norm(super().forward(x, t))  # type: ignore[no-any-return]

    adapt(lambda path, device: model(Normed()))
    assert isinstance(load_adapted(folder, NAME).network, Normed)


@pytest.mark.parametrize("name", ["weights.bin", "model.py", "weights.pt"])
def test_the_folder_stays_data(adapt: Any, folder: Path, name: str) -> None:
    adapt(lambda path, device: pytest.fail("the adapter saw an unchecked folder"))
    (folder / name).write_bytes(b"x")
    with pytest.raises(ModelRejectedError, match=name):
        load_adapted(folder, NAME)


def test_weights_that_are_not_finite_or_missing_are_refused_before_the_adapter(adapt: Any, folder: Path) -> None:
    adapt(lambda path, device: pytest.fail("the adapter saw an unchecked folder"))
    save_file({"a": torch.tensor([float("nan")])}, folder / "network.safetensors")
    with pytest.raises(ModelRejectedError, match="NaN"):
        load_adapted(folder, NAME)
    (folder / "network.safetensors").unlink()
    with pytest.raises(ModelRejectedError, match="holds no weights"):
        load_adapted(folder, NAME)


def test_a_repair_is_saved_in_the_dtype_of_the_source_and_opened_again(
    adapt: Any, folder: Path, tmp_path: Path
) -> None:
    half = {name: value.half() for name, value in load_file(folder / "network.safetensors").items()}
    save_file(half, folder / "network.safetensors")
    adapt(lambda path, device: read(path))
    repaired = load_adapted(folder, NAME).clone()
    with torch.no_grad():
        for parameter in repaired.network.parameters():
            parameter.mul_(0.5)
    check_savable(repaired, folder)
    contents = save_adapted(repaired, folder, tmp_path / "saved")
    assert sorted(file.path for file in contents.files) == ["README.md", "network.safetensors"]
    assert {value.dtype for value in load_file(tmp_path / "saved/network.safetensors").values()} == {torch.float16}
    again, x, t = load_adapted(tmp_path / "saved", NAME), torch.randn(2, *SHAPE), torch.tensor([0, 5])
    with torch.no_grad():
        torch.testing.assert_close(again.noise(x, t), repaired.noise(x, t))


@pytest.mark.parametrize("kind", ["prefix", "two files"])
def test_a_model_that_cannot_be_saved_says_so(adapt: Any, folder: Path, tmp_path: Path, kind: str) -> None:
    tensors = load_file(folder / "network.safetensors")
    if kind == "prefix":
        save_file({f"net.{name}": value for name, value in tensors.items()}, folder / "network.safetensors")
    else:
        save_file(tensors, folder / "second.safetensors")
    ours = model()
    for attempt in (lambda: check_savable(ours, folder), lambda: save_adapted(ours, folder, tmp_path / "saved")):
        with pytest.raises(InputError, match="can be scanned but not repaired") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()
