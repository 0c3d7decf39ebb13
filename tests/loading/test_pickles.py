"""Torch pickles where they are allowed: what passes is converted, and everything else refuses."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading import pickles, unpickle
from diffdefend_core.loading.pickles import convert_pickles, scan_pickle
from diffdefend_core.loading.static import inspect_folder

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


def to_pickle(folder: Path, suffix: str = ".bin") -> Path:
    """Store the weights of a model as a pickle of torch, as diffusers did before safetensors."""
    target = (folder / WEIGHTS).with_suffix(suffix)
    torch.save(OrderedDict(load_file(folder / WEIGHTS)), target)
    (folder / WEIGHTS).unlink()
    return target


def saved(tmp_path: Path, value: Any) -> Path:
    torch.save(value, tmp_path / "w.bin")
    return tmp_path / "w.bin"


def rewritten(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], **options: Any) -> None:
    """Write the archive again with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)


@pytest.mark.parametrize("suffix", [".bin"])
def test_the_weights_of_a_pickle_become_the_same_safetensors(model_folder: Path, suffix: str) -> None:
    before = inspect_folder(model_folder)
    tensors = load_file(model_folder / WEIGHTS)
    to_pickle(model_folder, suffix)
    found = convert_pickles(model_folder)
    assert [item.path for item in found] == [WEIGHTS.with_suffix(suffix).as_posix()]
    after = load_file(model_folder / WEIGHTS)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert [file.path for file in inspect_folder(model_folder).files] == [file.path for file in before.files]


def test_this_process_does_not_import_torch(model_folder: Path) -> None:
    to_pickle(model_folder)
    code = (
        "import sys, pathlib; from diffdefend_core.loading.pickles import convert_pickles;"
        "sys.exit(len(convert_pickles(pathlib.Path(sys.argv[1]))) != 1 or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(model_folder)], check=False).returncode == 0


def test_the_scan_names_what_a_pickle_imports(tmp_path: Path) -> None:
    found = scan_pickle(saved(tmp_path, {"a": torch.zeros(2)}))
    assert found == ["collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]


def test_a_pickle_beside_safetensors_of_its_name_is_refused(model_folder: Path) -> None:
    torch.save(load_file(model_folder / WEIGHTS), (model_folder / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(ModelRejectedError, match="which of them would be used is not certain"):
        convert_pickles(model_folder)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.zeros(2)], "it holds a list"),
        ({}, "it holds a dict"),
        ({"a": {"b": torch.zeros(2)}}, "'a' is a dict"),
        ({1: torch.zeros(2)}, "1 is a Tensor and no plain tensor"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "is of torch.int64"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "its tensors are larger than the file"),
    ],
)
def test_other_things_than_a_dictionary_of_tensors_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    path = saved(tmp_path, value)
    with pytest.raises(ValueError, match=words):
        unpickle.read(str(path), path.stat().st_size)


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), {"a": torch.zeros(2).to_sparse()}])
def test_imports_that_weights_do_not_need_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ModelRejectedError, match=r"imports '.*torch.*, which a dictionary of weights does not need"):
        scan_pickle(saved(tmp_path, value))


def test_what_torch_refuses_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    saved(tmp_path, [torch.zeros(2)])
    with pytest.raises(ModelRejectedError, match=r"refused by torch\.load.*it holds a list"):
        convert_pickles(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pickle_that_picklescan_cannot_parse_is_refused_though_it_passes_it(tmp_path: Path) -> None:
    from picklescan.scanner import scan_pickle_bytes

    broken = b"\xff\xff this is no pickle"
    result = scan_pickle_bytes(io.BytesIO(broken), "broken", strict=True)
    assert not result.issues_count and not result.scan_err  # the scanner by itself fails open
    path = saved(tmp_path, {"a": torch.zeros(2)})
    rewritten(path, lambda members: {name: broken if "pkl" in name else old for name, old in members.items()})
    with pytest.raises(ModelRejectedError):
        scan_pickle(path)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda members: {**members, "w/evil.py": b"x"}, {}, "other members"),
        (lambda members: {**members, "other/data.pkl": members["w/data.pkl"]}, {}, "other members"),
        (lambda members: {**members, "w/../data/9": b"x"}, {}, "other members"),
        (lambda members: {k: v for k, v in members.items() if "pkl" not in k}, {}, "other members"),
        (lambda members: members, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        (
            lambda members: {**members, "w/data.pkl": members["w/data.pkl"] + b"cos\nsystem\n."},
            {},
            "imports 'os.system",
        ),
        (lambda members: {**members, "w/data.pkl": members["w/data.pkl"] + b"N."}, {}, "something after its pickle"),
        (lambda members: {**members, "w/data.pkl": members["w/data.pkl"][:-1]}, {}, "did not pass picklescan"),
        (lambda members: {**members, "w/data.pkl": b"N" * (3 << 20) + b"."}, {}, "a pickle of 3145729 bytes"),
    ],
)
def test_archives_that_torch_did_not_write_are_refused(tmp_path: Path, change: Any, options: Any, words: str) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2)})
    rewritten(path, lambda members: {("w/" + k.partition("/")[2]): v for k, v in members.items()})
    plain = path.read_bytes()
    rewritten(path, change, **options)
    with pytest.raises(ModelRejectedError, match=words):
        scan_pickle(path)
    path.write_bytes(plain)
    assert scan_pickle(path)  # the control: without the change it passes


@pytest.mark.parametrize("where", ["before", "after"])
def test_bytes_around_the_archive_are_refused(tmp_path: Path, where: str) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2)})
    content = path.read_bytes()
    path.write_bytes(b"MZ" + content if where == "before" else content + b"\0\0")
    with pytest.raises(ModelRejectedError, match="bytes before or after"):
        scan_pickle(path)


def test_a_table_of_contents_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {f"t{number}": torch.zeros(2) for number in range(50)})
    assert scan_pickle(path)
    monkeypatch.setattr(pickles, "MAX_MEMBERS", 20)
    monkeypatch.setattr(pickles.zipfile, "ZipFile", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelRejectedError, match="a table of contents of"):
        scan_pickle(path)


def test_the_process_of_torch_sees_no_credentials(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    spy = model_folder / "spy.py"
    spy.write_text("import os, sys; sys.stderr.write(' '.join(sorted(os.environ))); sys.exit(1)")
    monkeypatch.setattr(pickles, "SCRIPT", spy)
    to_pickle(model_folder)
    with pytest.raises(ModelRejectedError) as caught:
        convert_pickles(model_folder)
    assert "PATH" in caught.value.found and "AWS" not in caught.value.found


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2)})
    spy = tmp_path / "spy.py"
    spy.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pickles, "SCRIPT", spy)
    monkeypatch.setattr(pickles, "BASE_SECONDS", 0.2)
    with pytest.raises(ModelRejectedError, match="was not read within"):
        convert_pickles(path.parent)


def test_its_memory_is_limited(tmp_path: Path) -> None:
    """The real script under its own limit: an archive of a few bytes may not take gigabytes."""
    code = (
        "import sys, torch, importlib.util; spec = importlib.util.spec_from_file_location('unpickle', sys.argv[1]);"
        "script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script); script.limit(1000);"
        "torch.zeros(int(sys.argv[2])).fill_(1)"
    )
    for elements, passes in ((10**6, True), (10**9, False)):
        command = [sys.executable, "-c", code, str(pickles.SCRIPT), str(elements)]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (done.returncode == 0) is passes


def test_a_folder_without_pickles_is_left_as_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert convert_pickles(tmp_path) == ()
