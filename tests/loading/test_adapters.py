"""Finding an adapter: by entry point or by module and function, and one line when that fails."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdefend_core.errors import InputError
from diffdefend_core.loading.adapters import GROUP, call_adapter, describe, find_adapter, installed, origin

MODULE = """
class Described:
    family = "mine"
    shape = (1, 8, 8)

def good(folder, device):
    return Described()

def raising(folder, device):
    raise KeyError("no such tensor\\nsecond line")

def leaving(folder, device):
    raise SystemExit(0)

number = 3
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path with modules and an installed distribution that offers three adapters."""
    (tmp_path / "some_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import no_such_library\n")
    (tmp_path / "leaving_models.py").write_text("raise SystemExit(0)\n")
    info = tmp_path / "some_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-models\nVersion: 1.0\n")
    lines = ["mine = some_models:good", "gone = some_models:absent", "twice = some_models:good"]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(f"[{GROUP}]\ntwice = some_models:raising\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_models"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["some_models:good", "mine"])
def test_an_adapter_is_found_and_described(modules: Path, name: str) -> None:
    assert describe(name, call_adapter(name, modules, "cpu")) == ("mine", (1, 8, 8))
    assert "mine" in installed()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some_models:absent", "some_models:absent cannot be imported: AttributeError: "),
        ("some_models:number", "some_models:number is an object of type int"),
        ("no_such_module:load", "no_such_module:load cannot be imported: ModuleNotFoundError: No module named"),
        ("broken_models:load", "broken_models:load cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("leaving_models:load", "leaving_models:load cannot be imported: SystemExit: 0"),
        (":load", ":load cannot be imported: ValueError"),
        ("some_models:", "some_models: cannot be imported: AttributeError"),
        ("gone", "gone cannot be imported: AttributeError"),
        ("unknown", "0 installed packages offer an adapter 'unknown'; expected one of .*mine.*, or package"),
        ("twice", "2 installed packages offer an adapter 'twice'"),
    ],
)
def test_an_adapter_that_cannot_be_found_is_one_line(modules: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        find_adapter(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some_models:raising", "some_models:raising failed on the model: KeyError: 'no such tensor"),
        ("some_models:leaving", "some_models:leaving failed on the model: SystemExit: 0"),
    ],
)
def test_an_adapter_that_raises_is_one_line(modules: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call_adapter(name, modules, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [None, (8, 8), (1, 8, 0), (1, 8, 8.0), (1, 8, True), "188"])
def test_a_wrong_shape_is_named(shape: object) -> None:
    class Returned:
        family = "mine"

    Returned.shape = shape  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the adapter some returned a Denoiser of shape"):
        describe("some", Returned())


def test_changed_code_has_another_origin(modules: Path) -> None:
    first = origin("some_models:good")
    assert first.startswith("some_models, sha256 ") and origin("mine") == first
    with (modules / "some_models.py").open("a") as file:
        file.write("# changed\n")
    assert origin("some_models:good") != first


def test_no_torch_is_needed_to_find_one(modules: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(modules)!r}); import diffdefend_core.loading.adapters as a;"
        "a.find_adapter('mine'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
