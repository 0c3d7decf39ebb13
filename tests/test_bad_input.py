"""Bad input to `scan` and `run`: one clear line on stderr, exit code 2, nothing left in store or registry."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3Server, free_port
from safetensors.numpy import load_file, save_file
from tiny_scan import calibration_for, flags_of, tiny_settings

from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.io import registry

ROOT = Path(__file__).parents[1]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMANDS = ("scan", "run")


@pytest.fixture(scope="session")
def clean_calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    return calibration_for(tmp_path_factory.mktemp("calibration"), "clean")


@pytest.fixture(scope="session")
def registry_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with one registered model that nobody may touch."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    registry.register_source(uri, "faces", "s3://team/faces/", {registry.DIGEST_TAG: "a" * 64})
    registry.move_alias(uri, "faces", "champion", "1")
    return uri


@pytest.fixture
def settings(tmp_path: Path, clean_calibration: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tiny_settings(tmp_path / "place", clean_calibration)


@pytest.fixture
def stages_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kfp.local run the command of each stage in this process: the same path without seconds of imports."""
    from kfp.local import status

    import pipelines.local

    def run(self: pipelines.local.StageHandler) -> status.Status:
        err = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(err), redirect_stdout(io.StringIO()):
            for name, value in self.environment.items():
                patch.setenv(name, value)
            code = run_command(self.command()[3:])
        for line in err.getvalue().splitlines():
            self.log.line(line)
        return status.Status.FAILURE if code else status.Status.SUCCESS

    monkeypatch.setattr(pipelines.local.StageHandler, "run", run)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_out.weight"] = change(tensors["conv_out.weight"])
    save_file(tensors, folder / WEIGHTS)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def add_pickle(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def not_a_number(weights: np.ndarray) -> np.ndarray:
    return np.full_like(weights, np.nan)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "does not exist"),
    "empty": (empty, "is empty"),
    "truncated": (truncate, "truncated or padded"),
    "pickle": (add_pickle, "is a pickle"),
    "unknown class": (
        lambda folder: edit_json(folder / "model_index.json", _class_name="NoSuchPipeline"),
        "names the pipeline 'NoSuchPipeline'",
    ),
    "foreign code": (
        lambda folder: edit_json(folder / "model_index.json", unet=["my_module", "MyUNet"]),
        "unet in model_index.json is ['my_module', 'MyUNet']",
    ),
    "nan": (lambda folder: edit_weights(folder, not_a_number), "tensor conv_out.weight"),
    "not json": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
}
# Only a stage with torch can tell: the folder of the load stage stands then, whole, and nothing follows it.
LATE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shapes": (
        lambda folder: edit_json(folder / "unet/config.json", block_out_channels=[16, 16]),
        "the weights do not fit the configuration",
    ),
    "overflow": (
        lambda folder: edit_weights(folder, lambda weights: weights * np.float32(1e30)),
        "the model cannot be computed: the model's own samples are not finite",
    ),
}


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str], words: str) -> None:
    code = run_command(arguments)
    out, err = capfd.readouterr()
    assert_one_line(code, out, err, words)


def assert_one_line(code: int, out: str, err: str, words: str) -> None:
    errors = [line for line in err.splitlines() if line.startswith("diffdefend: error:")]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert words in errors[0] and "unexpected" not in errors[0]
    assert "Traceback" not in err and 'File "' not in err


def stages_in(store: str) -> list[str]:
    """Return the stages that left a folder in a local store, all of them finished."""
    root = Path(store.removeprefix("file://"))
    folders = [folder for stage in root.glob("*") for folder in stage.iterdir()]
    assert all((folder / "manifest.json").is_file() for folder in folders)
    return sorted(folder.parent.name for folder in folders)


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stages_here")
def test_a_refused_model_leaves_nothing(
    command: str, kind: str, settings: Settings, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, words = SPOILED[kind]
    spoil(model_folder)
    refused([command, str(model_folder), *flags_of(settings)], capfd, words)
    assert not Path(settings.store.removeprefix("file://")).parent.exists(), "neither store nor registry"


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stages_here")
def test_a_model_that_only_torch_can_refuse_leaves_its_whole_load_folder(
    command: str, kind: str, settings: Settings, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, words = LATE[kind]
    spoil(model_folder)
    refused([command, str(model_folder), *flags_of(settings)], capfd, words)
    assert stages_in(settings.store) == ["load"]
    assert not Path(settings.tracking_uri.removeprefix("sqlite:///")).exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stages_here")
def test_a_registered_version_that_is_refused_leaves_the_registry_as_it_was(
    command: str, settings: Settings, registry_uri: str, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    truncate(model_folder)
    name = f"spoiled-{command}"
    registry.register_source(registry_uri, name, model_folder.as_uri(), {registry.DIGEST_TAG: "b" * 64})
    registry.move_alias(registry_uri, name, "champion", "1")
    before = everything_in(registry_uri, name)
    flags = flags_of(settings.model_copy(update={"tracking_uri": registry_uri}))
    refused([command, f"models:/{name}/1", *flags], capfd, "truncated or padded")
    assert everything_in(registry_uri, name) == before
    assert stages_in(settings.store) == []


def everything_in(registry_uri: str, *names: str) -> dict[str, object]:
    """Return versions with their tags, and aliases, of the registered models."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)
    held = {model.name: dict(model.aliases) for model in client.search_registered_models()}
    versions = {(item.name, str(item.version)): dict(item.tags) for item in client.search_model_versions()}
    assert set(names) <= set(held)
    return {"aliases": held, "versions": versions, "experiments": len(client.search_experiments())}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("models:/nobody/1", "version 1 of the model 'nobody' is not in the registry"),
        ("models:/nobody@champion", "the model 'nobody' is not in the registry"),
        ("models:/faces/99", "version 99 of the model 'faces' is not in the registry"),
        ("models:/faces@no-such-alias", "the alias 'no-such-alias' of the model 'faces' is not in the registry"),
        ("models:/faces", "is not a model URI"),
    ],
)
def test_scan_of_a_name_that_is_not_in_the_registry(
    settings: Settings, registry_uri: str, capfd: pytest.CaptureFixture[str], source: str, words: str
) -> None:
    before = everything_in(registry_uri)
    flags = flags_of(settings.model_copy(update={"tracking_uri": registry_uri}))
    refused(["scan", source, *flags], capfd, words)
    assert everything_in(registry_uri) == before and stages_in(settings.store) == []


@pytest.mark.usefixtures("stages_here")
def test_run_of_a_name_that_is_not_in_the_registry(
    settings: Settings, registry_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(registry_uri)
    flags = flags_of(settings.model_copy(update={"tracking_uri": registry_uri}))
    refused(["run", "models:/nobody/1", *flags], capfd, "version 1 of the model 'nobody' is not in the registry")
    assert everything_in(registry_uri) == before and stages_in(settings.store) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stages_here")
def test_a_registry_that_cannot_be_reached(
    command: str, settings: Settings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    flags = flags_of(settings.model_copy(update={"tracking_uri": f"http://127.0.0.1:{free_port()}"}))
    refused([command, "models:/faces/1", *flags], capfd, "the registry http://127.0.0.1:")
    assert stages_in(settings.store) == []


@pytest.mark.parametrize("place", ["source", "store"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stages_here")
def test_a_wrong_secret(
    command: str, place: str, settings: Settings, model_folder: Path, s3_environment: S3Server,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket = s3_environment.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-not-this-one")
    arguments = at_s3(command, place, bucket, settings, model_folder)
    refused(arguments, capfd, "check AWS_SECRET_ACCESS_KEY")
    assert list(s3_environment.client.list_objects(bucket, recursive=True)) == []
    assert stages_in(settings.store) == []


@pytest.mark.parametrize(("command", "place"), [("scan", "source"), ("run", "store")])
def test_an_s3_endpoint_that_cannot_be_reached(
    command: str, place: str, settings: Settings, model_folder: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    arguments = at_s3(command, place, "bucket", settings, model_folder)
    refused(arguments, capfd, "cannot be reached (the connection was refused)")
    assert stages_in(settings.store) == []


def at_s3(command: str, place: str, bucket: str, settings: Settings, model_folder: Path) -> list[str]:
    """Return the arguments of a command whose source or store lies in a bucket."""
    if place == "source":
        return [command, f"s3://{bucket}/model/", *flags_of(settings)]
    return [command, str(model_folder), *flags_of(settings.model_copy(update={"store": f"s3://{bucket}/store"}))]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_program_itself_says_one_line(command: str, settings: Settings, model_folder: Path, tmp_path: Path) -> None:
    """As a user starts it: whatever libraries print at their import counts too."""
    truncate(model_folder)
    arguments = [sys.executable, "-m", "diffdefend_core", command, str(model_folder), *flags_of(settings)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert_one_line(done.returncode, done.stdout, done.stderr, "truncated or padded")
    assert done.stderr.count("\n") == 1
    assert not Path(settings.store.removeprefix("file://")).exists()


def test_the_same_arguments_with_a_good_model_are_not_refused(
    settings: Settings, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["scan", str(model_folder), *flags_of(settings)]) == 0
    out, err = capfd.readouterr()
    assert "clean" in out and "error" not in err
    assert stages_in(settings.store) == ["detect", "invert_trigger", "load"]


def test_a_calibration_of_other_options_is_refused_before_the_model_is_touched(
    settings: Settings, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags_of(settings), "--set", "inversion.pairs=2"]
    refused(["scan", str(model_folder), *flags], capfd, "calibration tiny was measured with options")
    assert stages_in(settings.store) == []
