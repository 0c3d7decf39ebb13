"""Models of the Hugging Face Hub: from a cache folder as the library leaves it, and from a server of its API."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hub_server import COMMIT, NAME, URI, hub_server, write_cache

from diffdefend_core.artifacts import ModelRef
from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError, ModelRejectedError, StoreError
from diffdefend_core.io.folders import content_digest, digest_files
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.inspect_model import inspect_model
from diffdefend_core.stages.load import load

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    return tmp_path / "cache"


def settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings(store=f"file://{tmp_path}/store", **changes)


def reference(uri: str) -> ModelRef:
    return read_record(ModelRef, uri, "model_ref")


def test_a_model_in_the_local_cache_is_loaded_without_a_network(
    model_folder: Path, cache: Path, tmp_path: Path
) -> None:
    write_cache(model_folder, cache)
    found = reference(load(URI, settings=settings(tmp_path)))
    assert (found.name, found.source, found.findings) == ("tiny", URI, ())
    assert found.digest == content_digest(digest_files(model_folder))


def test_what_is_not_in_the_cache_is_not_fetched_unless_the_network_is_allowed(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(model_folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(StoreError, match=r"not whole, in the local cache.*--allow-network"):
            load(URI, settings=settings(tmp_path))
        assert hub.served == []
        found = reference(load(URI, settings=settings(tmp_path, allow_network=True)))
    assert found.digest == content_digest(digest_files(model_folder))
    assert reference(load(URI, settings=settings(tmp_path))).digest == found.digest  # from the cache by now


def test_pickles_and_code_of_a_repository_are_left_there(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = content_digest(digest_files(model_folder))
    for name in ("unet/diffusion_pytorch_model.bin", "pipeline.py", "picture.png"):
        (model_folder / name).write_bytes(b"x")
    with hub_server(model_folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        found = reference(load(URI, settings=settings(tmp_path, allow_network=True, allow_pickles=True)))
    assert found.digest == digest and "3 files of the repository are no part of the model" in found.findings[0]
    assert not any(name.endswith((".bin", ".py", ".png")) for name in hub.served)


def test_a_repository_without_safetensors_is_refused_even_if_pickles_are_allowed(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_folder / WEIGHTS).rename((model_folder / WEIGHTS).with_suffix(".bin"))
    with hub_server(model_folder) as hub, pytest.raises(ModelRejectedError, match="holds no safetensors"):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        load(URI, settings=settings(tmp_path, allow_network=True, allow_pickles=True))
    assert hub.served == []


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_a_changed_file_in_the_cache_is_noticed(model_folder: Path, cache: Path, tmp_path: Path, name: str) -> None:
    blob = (write_cache(model_folder, cache) / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(StoreError, match="is not the file of that commit"):
        load(URI, settings=settings(tmp_path))


def test_a_download_that_differs_from_what_the_server_lists_is_noticed(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(model_folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        load(URI, settings=settings(tmp_path, allow_network=True))
        shutil.rmtree(cache / "models--team--tiny" / "snapshots")
        blob = next((cache / "models--team--tiny" / "blobs").glob("?" * 64))
        blob.write_bytes(blob.read_bytes()[:-1] + b"!")
        with pytest.raises(StoreError, match="is not the file of that commit"):
            load(URI, settings=settings(tmp_path, allow_network=True))


def test_a_link_out_of_the_cache_is_refused(model_folder: Path, cache: Path, tmp_path: Path) -> None:
    (write_cache(model_folder, cache) / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match=r"'notes\.txt' leads out of the local cache"):
        load(URI, settings=settings(tmp_path))


@pytest.mark.parametrize(
    "uri",
    [
        f"hf://{NAME}",
        f"hf://{NAME}@main",
        f"hf://{NAME}@{COMMIT[:7]}",
        f"hf://{NAME}@{COMMIT}/unet",
        f"hf://a/b/c@{COMMIT}",
    ],
)
def test_only_a_full_commit_names_a_model(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError, match="a commit hash of 40 hex digits"):
        load(uri, settings=settings(tmp_path))


def test_a_repository_that_is_not_there_is_one_clear_error(
    model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(model_folder) as hub, pytest.raises(StoreError, match="check name, commit, HF_ENDPOINT"):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        load(URI.replace("tiny", "other"), settings=settings(tmp_path, allow_network=True))


def test_inspect_shows_what_a_repository_holds(model_folder: Path, cache: Path, tmp_path: Path) -> None:
    write_cache(model_folder, cache)
    found = inspect_model(URI, settings=settings(tmp_path))
    assert found["accepted"] and {item["path"] for item in found["files"]} == {
        os.path.relpath(path, model_folder) for path in model_folder.rglob("*") if path.is_file()
    }
