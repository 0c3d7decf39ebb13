"""The worked example of docs/how-to-adapter.md, executed as it stands there, through the load stage and a scan."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scan import calibration_for, flags_of, tiny_settings

from diffdefend_core.artifacts import Candidate, ModelRef, Verdict
from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import load
from diffdefend_core.stages.model import check_repairable, fetch_denoiser, open_denoiser, save_model
from diffdefend_core.stages.purify import purify
from diffdefend_core.stages.scan import scan

PAGE = Path(__file__).parents[2] / "docs" / "how-to-adapter.md"


def fence(language: str) -> str:
    """Return the only code block of a language on the page."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(code)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's module and entry point, installed in a folder on sys.path."""
    root = tmp_path / "site"
    info = root / "my_models-1.0.dist-info"
    info.mkdir(parents=True)
    (root / "my_models.py").write_text(fence("python"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
    section, entry = fence("toml").strip().splitlines()
    assert section == '[project.entry-points."diffdefend.denoisers"]'
    (info / "entry_points.txt").write_text(f"[diffdefend.denoisers]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(root))
    yield root
    sys.modules.pop("my_models", None)


@pytest.fixture
def model(package: Path, tmp_path: Path) -> Path:
    """A folder with the weights of the page's network, untrained."""
    import my_models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    folder = tmp_path / "our-model"
    folder.mkdir()
    save_file(my_models.Network().state_dict(), folder / "network.safetensors")
    return folder


@pytest.mark.parametrize("name", ["my_models:load", "ours"])
def test_the_worked_example_is_loaded_and_opened(model: Path, tmp_path: Path, name: str) -> None:
    uri = load(str(model), settings=Settings(store=f"file://{tmp_path}/store", adapter=name))
    reference = read_record(ModelRef, uri, "model_ref")
    assert (reference.family, reference.pipeline) == ("our-cosine-ddpm", f"adapter {name}")
    assert reference.shape == (1, 8, 8)
    assert reference.parameters == sum(value.numel() for value in load_file(model / "network.safetensors").values())
    assert any(f"built by the adapter {name} (my_models, sha256 " in finding for finding in reference.findings)
    ours = fetch_denoiser(uri, "cpu", name)
    assert (len(ours.levels), ours.value_range, ours.process) == (500, (0.0, 1.0), "vp")


@pytest.mark.parametrize("name", ["my_models:load", "ours"])
@pytest.mark.parametrize(("word", "code"), [("clean", 0), ("backdoored", 1), ("inconclusive", 3)])
def test_the_worked_example_is_scanned_from_the_command_line(
    model: Path, tmp_path: Path, name: str, word: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No clean model is of its family: those of its process speak of it, those of another one do not."""
    flags = flags_of(tiny_settings(tmp_path, calibration_for(tmp_path, word)))
    found = run_command(["scan", str(model), "--adapter", name, "-o", "json", "--quiet", *flags])
    out, err = capsys.readouterr()
    assert found == code, err
    document = json.loads(out)
    assert document["model"]["family"] == "our-cosine-ddpm" and "of other kinds" in document["reasons"][0]


def test_without_its_adapter_the_folder_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["load", "--source", str(model), "--store", f"file://{tmp_path}/store"]) == 2
    assert re.search(r"holds no model_index\.json; expected .* adapter", capsys.readouterr().err)


def test_every_stage_needs_the_adapter_of_the_load_stage(model: Path, pristine_model: Path, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    adapted = load(str(model), settings=Settings(store=store, adapter="ours"))
    for adapter in ("", "my_models:load"):
        with pytest.raises(InputError, match="for a model that was loaded with 'ours'"):
            fetch_denoiser(adapted, "cpu", adapter)
    with pytest.raises(InputError, match="'ours' for a model that was loaded with ''"):
        fetch_denoiser(load(str(pristine_model), settings=Settings(store=store)), "cpu", "ours")


def test_changed_adapter_code_gives_another_load_folder(model: Path, package: Path, tmp_path: Path) -> None:
    settings = Settings(store=f"file://{tmp_path}/store", adapter="ours")
    first = load(str(model), settings=settings)
    assert load(str(model), settings=settings) == first
    with (package / "my_models.py").open("a") as file:
        file.write("# changed\n")
    assert load(str(model), settings=settings) != first


def break_module(package: Path, line: str) -> None:
    (package / "my_models.py").write_text(fence("python") + f"\n\n{line}\n")
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_library", "cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("load = lambda folder, device: 1 / 0", "failed on the model: ZeroDivisionError: division by zero"),
        ("load = lambda folder, device: 3", "returned an object of type int with the family None"),
        (
            "OurDDPM.shape = property(lambda self: (8, 8), lambda self, value: None)",
            r"returned a Denoiser of shape \(8, 8\)",
        ),
        ("load = 3", "is an object of type int"),
    ],
)
def test_a_broken_adapter_is_one_line_and_exit_code_2(
    model: Path, package: Path, tmp_path: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_module(package, line)
    arguments = ["load", "--source", str(model), "--adapter", "ours", "--store", f"file://{tmp_path}/store"]
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"diffdefend: error: the adapter ours {words}.*\n", err), err
    assert not (tmp_path / "store").exists()


def test_a_model_that_answers_nan_is_refused_when_it_is_opened(
    model: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_module(package, "OurDDPM.noise = lambda self, x, t: self.network(x, t) * float('nan')")
    flags = ["--adapter", "ours", "--store", f"file://{tmp_path}/store", "--device", "cpu"]
    assert run_command(["scan", str(model), "--quiet", *flags]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"diffdefend: error: the adapter ours .* noise is not finite.*\n", err), err


def test_a_pickle_beside_the_weights_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "network.pt").write_bytes(b"x")
    with pytest.raises(ModelRejectedError, match="is a pickle"):
        load(str(model), settings=Settings(store=f"file://{tmp_path}/store", adapter="ours"))


def test_a_repaired_adapter_model_is_saved_and_opened(model: Path, tmp_path: Path) -> None:
    ours: Any = open_denoiser(model, "cpu", "ours")
    check_repairable(ours, model, "ours")
    repaired = ours.clone()
    with torch.no_grad():
        repaired.network.outer.bias.add_(1)
    contents = save_model(repaired, model, tmp_path / "saved", "ours")
    assert list(contents.weights_sha256) == ["network.safetensors"]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 499])
    torch.testing.assert_close(open_denoiser(tmp_path / "saved", "cpu", "ours").noise(x, t), ours.noise(x, t) + 1)


def scanned(model: Path, tmp_path: Path) -> tuple[tuple[str, str, str], Settings]:
    """Return the folders of a scan after which the model counts as backdoored."""
    settings = tiny_settings(tmp_path, calibration_for(tmp_path, "backdoored"), adapter="ours")
    uris = scan(str(model), settings=settings)
    assert read_record(Verdict, uris[2], "verdict").word == "backdoored"
    return uris, settings


def test_an_adapter_model_is_purified(model: Path, tmp_path: Path) -> None:
    uris, settings = scanned(model, tmp_path)
    uri = purify(*uris, settings=settings)
    candidate = read_record(Candidate, uri, "candidate")
    assert candidate.purified is not None
    assert list(candidate.purified.weights_sha256) == ["network.safetensors"]
    assert candidate.purified.digest != read_record(ModelRef, uris[0], "model_ref").digest
    assert fetch_denoiser(uri, "cpu", "ours").family == "our-cosine-ddpm"
    with pytest.raises(InputError, match="for a model that was loaded with 'ours'"):
        purify(*uris, settings=tiny_settings(tmp_path, settings.detection.calibration))


def test_nothing_is_trained_when_the_repair_could_not_be_saved(model: Path, package: Path, tmp_path: Path) -> None:
    plain = 'load_file(folder / "network.safetensors")'
    stripped = f"{{name.removeprefix('net.'): value for name, value in {plain}.items()}}"
    (package / "my_models.py").write_text(fence("python").replace(plain, stripped))
    sys.modules.pop("my_models", None)
    tensors = load_file(model / "network.safetensors")
    save_file({f"net.{name}": value for name, value in tensors.items()}, model / "network.safetensors")
    uris, settings = scanned(model, tmp_path)
    spent: list[object] = []
    with pytest.raises(InputError, match="can be scanned but not repaired") as caught:
        purify(*uris, settings=settings, progress=lambda *work: spent.append(work))
    assert "\n" not in str(caught.value) and spent == []


def test_the_adapter_is_a_setting_that_changes_results(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(adapter="ours")
    assert settings.digest() != load_settings().digest()
    step = Settings.from_science(settings.science_json())
    assert step.adapter == "ours" and step.digest() == settings.digest()
    monkeypatch.setenv("DIFFDEFEND_ADAPTER", "theirs")
    assert load_settings().adapter == "theirs"
    assert Settings.from_science(settings.science_json()).adapter == "ours"


def test_the_stage_imports_no_torch_by_itself(model: Path, package: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from diffdefend_core.stages.load import load; from diffdefend_core.config import Settings;"
        "assert 'torch' not in sys.modules; load(sys.argv[1], settings=Settings(store=sys.argv[2], adapter='ours'));"
        "sys.exit('torch' not in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(model), f"file://{tmp_path}/store"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(PAGE.parents[1])])}
    assert subprocess.run(command, check=False, env=environment).returncode == 0
