"""check-input from the command line to the exit code, on the shipped backdoors; and the page that shows it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_records import trigger as inverted_trigger
from torch import Tensor

from diffdefend_core.cli import run_command
from diffdefend_core.config import load_settings
from diffdefend_core.errors import InputError
from diffdefend_core.io import folders
from diffdefend_core.stages.check_input import check_input

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "zoo" / "digits"
BACKDOORS = ZOO / "backdoors"
STRIPES = BACKDOORS / "bad-a-stripes.safetensors"
SHAPE = (1, 16, 16)

Save = Callable[..., str]


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save an array as a .npy file; return its path."""

    def save(array: Any, name: str = "noise.npy") -> str:
        path = tmp_path / name
        np.save(path, np.asarray(array), allow_pickle=False)
        return str(path)

    return save


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def shift_of(path: Path) -> Tensor:
    return load_file(path)["trigger"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run_command(["check-input", *arguments, "-o", "json"])
    out, err = capsys.readouterr()
    assert err == "" or "variants" in err
    return code, json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command(["check-input", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffdefend: error: ") and err.count("\n") == 1
    return err


def test_a_row_with_the_trigger_is_flagged_and_clean_ones_are_not(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = drawn(3)
    noise[1] += shift_of(STRIPES)
    code, document = run(capsys, save(noise), "--trigger", str(STRIPES))
    assert code == 1 and document["flagged"] == 1 and document["shape"] == list(SHAPE)
    assert [row["flag"] for row in document["rows"]] == [False, True, False]
    assert document["rows"][1]["flagged_by"] == ["matched_filter"] and document["rows"][0]["flagged_by"] == []
    assert document["thresholds"] == {"matched_filter": pytest.approx(3.0902, abs=1e-4)}
    score, p_value = document["rows"][1]["scores"]["matched_filter"], document["rows"][1]["p_values"]["matched_filter"]
    assert score > 8 and p_value == pytest.approx(math.erfc(score / math.sqrt(2)) / 2)
    assert run(capsys, save(noise[::2]), "--trigger", str(STRIPES))[0] == 0


def test_a_file_with_gamma_is_also_checked_by_the_likelihood_ratio(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BACKDOORS / "troj-d2i-blend.safetensors"
    tensors = load_file(path)
    noise = torch.cat([drawn(4), tensors["gamma"] * drawn(4) + tensors["trigger"]])
    code, document = run(capsys, save(noise), "--trigger", str(path))
    assert code == 1 and document["thresholds"]["likelihood_ratio"] == pytest.approx(math.log(1000))
    assert ["likelihood_ratio" in row["flagged_by"] for row in document["rows"]] == [False] * 4 + [True] * 4


def test_without_a_trigger_the_noise_itself_is_tested(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    noise = torch.cat([drawn(2), drawn(1) + shift_of(BACKDOORS / "bad-a-box.safetensors"), 0.6 * drawn(1)])
    code, document = run(capsys, save(noise))
    rows = document["rows"]
    assert code == 1 and [row["flag"] for row in rows] == [False, False, True, True]
    assert rows[2]["p_values"]["mean"] < 1e-20 and rows[3]["p_values"]["norm"] < 1e-6 < rows[3]["p_values"]["mean"]
    assert rows[0]["scores"] == {} and document["thresholds"] == {"noise_tests": 0.001}


def test_a_shift_of_zero_mean_passes_the_noise_tests_of_a_single_noise(save: Save) -> None:
    assert run_command(["check-input", save(drawn(1)[0] + 0.2 * shift_of(STRIPES))]) == 0


def test_the_best_candidate_of_an_inversion_is_a_trigger_too(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, shift = inverted_trigger(), shift_of(STRIPES)
    source, uri = tmp_path / "work", f"file://{tmp_path}/store/invert_trigger/key/"
    source.mkdir()
    (source / "inverted_trigger.json").write_text(record.to_json())
    names = [candidate.name for candidate in record.candidates]
    save_file(
        {f"tau/{name}": (-1.0) ** (name != record.best) * shift for name in names}, source / "trigger.safetensors"
    )
    folders.publish(source, uri, stage="invert_trigger", key="key", producer="test")
    noise = save(drawn(2) + shift)
    for place in (uri, f"{tmp_path}/store/invert_trigger/key"):
        code, document = run(capsys, noise, "--trigger", place)
        assert code == 1 and document["flagged"] == 2


def test_a_model_is_asked_by_the_sampler_that_was_chosen(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    noise = save(torch.cat([drawn(1, seed=5), drawn(1) + shift_of(STRIPES)]))
    model = [noise, "--model", str(ZOO / "bad-a-stripes"), "--device", "cpu", "--false-positive-rate", "0.2"]
    few = ["--set", "detection.stochastic_steps=20", "--set", "detection.deterministic_steps=3"]
    code, document = run(capsys, *model, *few, "--sampler", "ddpm", "--trigger", str(STRIPES))
    assert code == 1 and document["rows"][1]["flagged_by"] == ["matched_filter", "ufid"]
    plain, triggered = (row["scores"]["ufid"] for row in document["rows"])
    assert plain < 0.75 and triggered > 0.9
    assert document["forward_equivalents"] == (2 + 4) * 8 * 20
    _, document = run(capsys, *model, *few)
    assert document["forward_equivalents"] == (2 + 4) * 8 * 3
    assert set(document["thresholds"]) == {"noise_tests", "ufid"}


def test_the_table_has_a_line_for_each_row(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    noise = drawn(2)
    noise[1] += shift_of(STRIPES)
    assert run_command(["check-input", save(noise), "--trigger", str(STRIPES)]) == 1
    head, _, first, second = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert "matched filter" in head and first.split()[-1] == "no" and second.split()[-1] == "matched_filter"


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4"])
def test_noise_of_every_floating_type_is_read(save: Save, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    noise = (drawn(1) + shift_of(STRIPES)).numpy().astype(kind)
    _, document = run(capsys, save(noise, "a noise #1.npy"), "--trigger", str(STRIPES))
    assert document["flagged"] == 1


def test_noise_may_be_a_tensor_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"noise": (drawn(1)[0] + shift_of(STRIPES)).bfloat16()}, tmp_path / "noise.safetensors")
    assert run(capsys, f"file://{tmp_path}/noise.safetensors", "--trigger", str(STRIPES))[0] == 1


def test_noise_in_a_bucket_is_read(store_uri: str, tmp_path: Path) -> None:
    from diffdefend_core.io.store import open_store

    store, prefix = open_store(store_uri)
    np.save(tmp_path / "there.npy", drawn(1).numpy())
    store.put(f"{prefix}there.npy", tmp_path / "there.npy")
    document = check_input(f"{store_uri}/there.npy", settings=load_settings(), false_positive_rate=0.001)
    assert document["flagged"] == 0


def changed(value: float) -> np.ndarray:
    noise = drawn(1).numpy()
    noise[0, 0, 3, 3] = value
    return noise


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (changed(math.nan), "not finite"),
        (changed(math.inf), "not finite"),
        (changed(1.0).astype(np.float64) * 1e200, "not finite"),
        (np.zeros((16, 16), np.float32), "[N, C, H, W]"),
        (np.zeros((0, 1, 16, 16), np.float32), "[N, C, H, W]"),
        (np.zeros((1, 16, 16), np.int64), "int64"),
        (np.zeros((1, 16, 16), np.complex64), "complex64"),
        (np.array(["noise"]), "<U5"),
        (np.zeros((1, 1, 16, 15), np.float32), "the shape of the trigger"),
        (np.zeros((3, 16, 16), np.float32), "the shape of the trigger"),
    ],
)
def test_an_array_that_is_no_noise_is_refused(
    save: Save, capsys: pytest.CaptureFixture[str], array: np.ndarray, said: str
) -> None:
    assert said in refused(capsys, save(array), "--trigger", str(STRIPES))


def test_every_truncated_or_foreign_file_is_refused(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = Path(save(drawn(1)[0, :, :2, :2].numpy())).read_bytes()
    for length in (0, 3, 6, 9, 11, 40, 100, 127, 130, len(content) - 1):
        (tmp_path / "short.npy").write_bytes(content[:length])
        assert "cannot be read" in refused(capsys, str(tmp_path / "short.npy"))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", noise=drawn(1).numpy())
    (tmp_path / "archive.npy").write_bytes((tmp_path / "archive.npz").read_bytes())
    save_file({"sound": drawn(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    for name in ("pickled.npy", "archive.npy", "other.safetensors", "broken.safetensors"):
        said = refused(capsys, str(tmp_path / name))
        # numpy's own words advise to load a pickle unsafely
        assert "cannot be read" in said and "allow_pickle" not in said


def test_what_is_absent_or_unfit_is_one_line(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = save(drawn(1))
    save_file({"trigger": torch.zeros(SHAPE)}, tmp_path / "zero.safetensors")
    save_file({"trigger": torch.ones(SHAPE), "gamma": torch.zeros(SHAPE)}, tmp_path / "gamma.safetensors")
    save_file({"tau/1": torch.ones(SHAPE)}, tmp_path / "trigger.safetensors")
    assert "absent.npy" in refused(capsys, "absent.npy")
    assert "absent.safetensors" in refused(capsys, noise, "--trigger", "absent.safetensors")
    assert "has no manifest.json" in refused(capsys, noise, "--trigger", str(tmp_path))
    assert "zero everywhere" in refused(capsys, noise, "--trigger", "zero.safetensors")
    assert "standard deviation" in refused(capsys, noise, "--trigger", "gamma.safetensors")
    assert "folder of invert-trigger" in refused(capsys, noise, "--trigger", "trigger.safetensors")
    assert "give --model" in refused(capsys, noise, "--sampler", "DDIM")
    assert "false-positive-rate" in refused(capsys, noise, "--false-positive-rate", "0")
    assert "NOPE" in refused(capsys, noise, "--model", str(ZOO / "base-a"), "--sampler", "NOPE")
    small = save(np.zeros((1, 8, 8), np.float32), "small.npy")
    assert "the model's initial noise" in refused(capsys, small, "--model", str(ZOO / "base-a"), "--device", "cpu")


def test_the_snippet_of_the_page_refuses_triggered_noise(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "how-to-guard.md").read_text(), re.S | re.M)
    save_file({"trigger": shift_of(STRIPES)}, tmp_path / "trigger.safetensors")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["refused"](drawn(2) + shift_of(STRIPES)) and not names["refused"](drawn(2))
    with pytest.raises(InputError):
        names["refused"](torch.zeros(1, 3, 16, 16))
