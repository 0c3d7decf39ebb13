"""What `inspect` says of models that would be loaded and of such that would not; nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import S3Server
from safetensors.numpy import load_file

from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.io.store import open_store
from diffdefend_core.stages.inspect_model import inspect_model
from diffdefend_core.stages.load import load

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=f"file://{tmp_path}/store")


def test_a_model_that_would_be_loaded_is_described(model_folder: Path, settings: Settings) -> None:
    tensors = load_file(model_folder / WEIGHTS)
    found = inspect_model(str(model_folder), settings=settings)
    assert found["accepted"] and found["refusal"] is None and found["findings"] == []
    assert (found["family"], found["pipeline"], found["shape"]) == ("ddpm", "DDPMPipeline", [3, 8, 8])
    assert found["classes"] == {"unet": "UNet2DModel", "scheduler": "DDPMScheduler"}
    assert found["dtypes"] == {"F32": sum(tensor.size for tensor in tensors.values())}
    assert {item["name"]: tuple(item["shape"]) for item in found["tensors"]} == {n: t.shape for n, t in tensors.items()}
    digests = {item["path"]: item["sha256"] for item in found["files"]}
    assert digests[WEIGHTS] == hashlib.sha256((model_folder / WEIGHTS).read_bytes()).hexdigest()
    assert len(digests) == 4 and all(digests.values())


def test_its_digest_is_that_of_the_load_stage(model_folder: Path, settings: Settings) -> None:
    from diffdefend_core.artifacts import ModelRef
    from diffdefend_core.stages.folder import read_record

    reference = read_record(ModelRef, load(str(model_folder), settings=settings), "model_ref")
    assert inspect_model(str(model_folder), settings=settings)["digest"] == reference.digest


def test_a_refused_model_is_listed_with_the_reason_and_what_is_in_its_pickle(
    model_folder: Path, settings: Settings
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, ("exploded",)

    (model_folder / "a.bin").write_bytes(pickle.dumps(Bomb()))
    found = inspect_model(str(model_folder), settings=settings)
    assert not found["accepted"] and "a.bin is a pickle" in found["refusal"] and found["digest"] is None
    assert {item["path"]: item["format"] for item in found["files"]}["a.bin"] == "pickle"
    assert all(item["sha256"] for item in found["files"])
    assert len(found["findings"]) == 1 and "no archive of torch.save" in found["findings"][0]


def test_links_and_pipes_are_listed_and_not_opened(model_folder: Path, settings: Settings) -> None:
    (model_folder / "notes.txt").symlink_to("/etc/passwd")
    os.mkfifo(model_folder / "pipe.txt")
    found = inspect_model(str(model_folder), settings=settings)
    digests = {item["path"]: item["sha256"] for item in found["files"]}
    assert "is a link" in found["refusal"] and digests["notes.txt"] is None and digests["pipe.txt"] is None


def test_a_model_in_s3_is_inspected(model_folder: Path, s3_environment: S3Server, settings: Settings) -> None:
    source = f"s3://{s3_environment.bucket()}/tiny/"
    store, prefix = open_store(source)
    for path in filter(Path.is_file, model_folder.rglob("*")):
        store.put(prefix + path.relative_to(model_folder).as_posix(), path)
    found, local = inspect_model(source, settings=settings), inspect_model(str(model_folder), settings=settings)
    assert {**found, "source": 0} == {**local, "source": 0}


@pytest.mark.parametrize("output", ["table", "json"])
def test_the_command_prints_and_exits_0_or_1_or_2(
    model_folder: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    assert run_command(["inspect", str(model_folder), "-o", output]) == 0
    text = capsys.readouterr().out
    assert "UNet2DModel" in text and WEIGHTS in text
    (model_folder / "a.pkl").write_bytes(b"x")
    assert run_command(["inspect", str(model_folder), "-o", output]) == 1
    text = capsys.readouterr().out
    assert "a.pkl is a pickle" in (json.loads(text)["refusal"] if output == "json" else text)
    assert run_command(["inspect", str(model_folder / "none"), "-o", output]) == 2
    assert capsys.readouterr().err.startswith("diffdefend: error: there is nothing at ")


def test_it_runs_without_torch(model_folder: Path) -> None:
    code = (
        "import sys; from diffdefend_core.cli import run_command; code = run_command(['inspect', sys.argv[1]]);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'diffusers', 'mlflow', 'kfp', 'minio')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(model_folder)], check=False).returncode == 0
