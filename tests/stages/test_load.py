"""The load stage over a directory and over a real S3 server."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import S3Server

from diffdefend_core.artifacts import ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError, ModelRejectedError, StoreError
from diffdefend_core.io import folders, registry
from diffdefend_core.io.store import open_store
from diffdefend_core.loading import formats
from diffdefend_core.stages import source as source_stage
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.load import load

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def settings(store_uri: str, tmp_path: Path) -> Settings:
    return Settings(store=store_uri, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def upload(folder: Path, uri: str) -> None:
    store, prefix = open_store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(prefix + path.relative_to(folder).as_posix(), path)


def test_a_model_is_checked_and_addressed(model_folder: Path, settings: Settings, tmp_path: Path) -> None:
    uri = load(str(model_folder), settings=settings)
    manifest = folders.fetch(uri, tmp_path / "into")
    reference = read_record(ModelRef, uri, "model_ref")
    assert manifest.stage == "load" and uri.startswith(settings.store)
    assert (reference.name, reference.family, reference.shape) == ("tiny", "ddpm", (3, 8, 8))
    assert reference.digest == folders.content_digest(folders.digest_files(model_folder))
    assert folders.digest_files(tmp_path / "into/model") == reference.files


def test_the_same_bytes_have_the_same_address(model_folder: Path, settings: Settings, tmp_path: Path) -> None:
    uri = load(str(model_folder), settings=settings)
    assert load(model_folder.as_uri(), settings=settings) == uri
    assert load(str(shutil.copytree(model_folder, tmp_path / "copy")), settings=settings, name="tiny") == uri
    assert load(str(model_folder), settings=settings, name="other") != uri
    (model_folder / "README.md").write_text("another file")
    assert load(str(model_folder), settings=settings) != uri


def test_a_model_in_s3_is_loaded(model_folder: Path, s3_environment: S3Server, tmp_path: Path) -> None:
    source = f"s3://{s3_environment.bucket()}/models/tiny"
    upload(model_folder, source)
    upload(model_folder, source + "-sibling")
    settings = Settings(store=f"file://{tmp_path}/store")
    assert load(source, settings=settings) == load(str(model_folder), settings=settings)


def test_a_registered_version_is_loaded_by_version_and_alias(model_folder: Path, settings: Settings) -> None:
    version = registry.register_source(settings.tracking_uri, "faces", model_folder.as_uri(), {})
    registry.move_alias(settings.tracking_uri, "faces", "champion", version)
    uri = load(f"models:/faces/{version}", settings=settings)
    reference = read_record(ModelRef, uri, "model_ref")
    assert (reference.name, reference.registered_name, reference.registered_version) == ("faces", "faces", version)
    assert load("models:/faces@champion", settings=settings) == uri


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_nothing_there_is_an_input_error(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "model"
    if kind == "empty":
        source.mkdir()
    with pytest.raises(InputError, match=kind if kind == "empty" else "does not exist"):
        load(str(source), settings=Settings(store=f"file://{tmp_path}/store"))


def test_an_empty_prefix_is_an_input_error(s3_environment: S3Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing at s3://"):
        load(f"s3://{s3_environment.bucket()}/none/", settings=Settings(store=f"file://{tmp_path}/store"))
    with pytest.raises(StoreError, match="NoSuchBucket"):
        load("s3://no-such-bucket/none/", settings=Settings(store=f"file://{tmp_path}/store"))


@pytest.mark.parametrize("uri", ["http://host/model", "hf://name/model", "runs:/1/model"])
def test_other_places_are_an_input_error(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError):
        load(uri, settings=Settings(store=f"file://{tmp_path}/store"))


def test_a_rejected_model_leaves_no_folder(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "unet/model.bin").write_bytes(pickle.dumps(1))
    with pytest.raises(ModelRejectedError, match="is a pickle"):
        load(str(model_folder), settings=Settings(store=f"file://{tmp_path}/store"))
    assert not (tmp_path / "store").exists()


def test_a_pickle_in_s3_is_refused_before_anything_is_downloaded(
    model_folder: Path, s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"s3://{s3_environment.bucket()}/tiny/"
    (model_folder / "model.bin").write_bytes(b"")
    upload(model_folder, source)
    monkeypatch.setattr(source_stage, "_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ModelRejectedError, match="is a pickle"):
        load(source, settings=Settings(store=f"file://{tmp_path}/store"))


def test_the_size_is_limited_before_the_download(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(store=f"file://{tmp_path}/store")
    total = sum(path.stat().st_size for path in model_folder.rglob("*") if path.is_file())
    monkeypatch.setattr(formats, "MAX_TOTAL_BYTES", total - 1)
    with pytest.raises(ModelRejectedError, match=f"the model has {total} bytes"):
        load(str(model_folder), settings=settings)
    monkeypatch.setattr(formats, "MAX_TOTAL_BYTES", total)
    load(str(model_folder), settings=settings)


def test_a_link_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(ModelRejectedError, match="is a link"):
        load(str(model_folder), settings=Settings(store=f"file://{tmp_path}/store"))


def test_a_changed_load_folder_is_noticed(model_folder: Path, tmp_path: Path) -> None:
    uri = load(str(model_folder), settings=Settings(store=f"file://{tmp_path}/store"))
    weights = Path(uri.removeprefix("file://")) / "model" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"model/{WEIGHTS} changed"):
        folders.fetch(uri, tmp_path / "into")


def test_the_stage_runs_without_torch(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from diffdefend_core.config import Settings; from diffdefend_core.stages.load import load;"
        "load(sys.argv[1], settings=Settings(store=sys.argv[2]));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'mlflow', 'kfp', 'minio')))"
    )
    command = [sys.executable, "-c", code, str(model_folder), f"file://{tmp_path}/store"]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 0
