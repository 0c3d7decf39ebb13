"""A trusted reference: whom it may be, and that the folder of the search says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_pipeline
from tiny_scan import calibration_for, flags_of, publish_calibration, tiny_settings

from diffdefend_core.artifacts import InvertedTrigger, Verdict, Word
from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.io import folders
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.load import load

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def parent_model(place: Path, pristine_model: Path) -> Path:
    """Another model of the same kind."""
    folder = Path(shutil.copytree(pristine_model, place / "parent"))
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / WEIGHTS)
    moved = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_file(moved, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def calibration(place: Path) -> str:
    return calibration_for(place / "calibration", "clean")


def settings_with(place: Path, calibration: str, reference: Path | str) -> Settings:
    return tiny_settings(place, calibration, inversion={"reference": str(reference)})


def test_a_reference_is_a_parent_of_the_search_and_changes_it(
    place: Path, calibration: str, pristine_model: Path, parent_model: Path
) -> None:
    alone, beside = tiny_settings(place, calibration), settings_with(place, calibration, parent_model)
    model = load(str(pristine_model), settings=alone)
    uris = [invert_trigger(model, settings=settings) for settings in (alone, beside)]
    reference = load(str(parent_model), settings=alone)
    assert [item.uri for item in folders.finished(uris[0], "invert_trigger").parents] == [model]
    assert [item.uri for item in folders.finished(uris[1], "invert_trigger").parents] == [model, reference]
    first, second = (read_record(InvertedTrigger, uri, "inverted_trigger") for uri in uris)
    assert first.candidates != second.candidates
    assert second.forward_equivalents == first.forward_equivalents - 2 * 4 * 3  # no twin was trained
    verdict = detect(model, uris[1], settings=beside)
    assert read_record(Verdict, verdict, "verdict").word is Word.CLEAN
    assert invert_trigger(model, settings=beside) == uris[1]


def refused(arguments: list[str], settings: Settings, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a scan is refused with."""
    assert run_command(["scan", *arguments, "--quiet", *flags_of(settings)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"diffdefend: error: [^\n]*\n", err), err
    return err


def test_a_model_is_no_reference_of_itself(
    place: Path, calibration: str, pristine_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(pristine_model, tmp_path / "under-another-name")
    for reference in (pristine_model, copied):
        arguments = [str(pristine_model), "--reference", str(reference)]
        assert "the reference is the model itself" in refused(arguments, tiny_settings(place, calibration), capsys)


def test_a_reference_is_of_the_family_and_shape_of_the_model(
    place: Path, calibration: str, pristine_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(place, calibration)
    save_tiny_pipeline(place / "flow", "flow")
    line = refused([str(pristine_model), "--reference", str(place / "flow")], settings, capsys)
    assert "the reference is flow (3, 8, 8); expected ddpm (3, 8, 8)" in line
    digits = Path(__file__).parents[2] / "zoo" / "digits" / "base-a"
    line = refused([str(pristine_model), "--reference", str(digits)], settings, capsys)
    assert "the reference is ddpm (1, 16, 16); expected ddpm (3, 8, 8)" in line


@pytest.mark.parametrize("method", ["terd", "elijah", "purediffusion"])
def test_a_method_that_has_no_use_for_a_reference_refuses_it(
    place: Path, pristine_model: Path, parent_model: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(place, publish_calibration(place / method, {}, method=method))
    arguments = [str(pristine_model), "--reference", str(parent_model), "--method", method]
    assert f"--reference with the method {method}" in refused(arguments, settings, capsys)


def test_a_reference_that_is_not_there_is_refused(
    place: Path, calibration: str, pristine_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(pristine_model), "--reference", str(place / "nowhere")]
    assert "nowhere" in refused(arguments, tiny_settings(place, calibration), capsys)


def test_an_unknown_method_is_refused(
    place: Path, calibration: str, pristine_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(place, calibration)
    for command in (
        ["scan", str(pristine_model)],
        ["run", str(pristine_model)],
        ["calibrate", "a", "b", "--name", "c"],
    ):
        assert run_command([*command, "--method", "nonsense", *flags_of(settings)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "nonsense" in err and "Traceback" not in err
    assert "inversion.method" in refused([str(pristine_model), "--set", "inversion.method=nonsense"], settings, capsys)
