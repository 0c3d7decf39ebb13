"""Every refusal of the static checks, with the model that passes beside it."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.loading.static import inspect_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit_json(folder: Path, name: str, **changes: object) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**value, **changes}))


def test_what_diffusers_saves_passes(model_folder: Path) -> None:
    found = inspect_folder(model_folder)
    tensors = load_file(model_folder / WEIGHTS)
    assert (found.family, found.pipeline, found.shape) == ("ddpm", "DDPMPipeline", (3, 8, 8))
    assert found.parameters == sum(tensor.size for tensor in tensors.values())
    assert {name: info.shape for name, info in found.tensors[WEIGHTS].items()} == {
        n: t.shape for n, t in tensors.items()
    }
    assert sorted(found.weights_sha256) == [WEIGHTS]
    assert len(found.files) == 4 and found.findings == ()


def test_cards_and_unknown_keys_are_harmless(model_folder: Path) -> None:
    for name in ("README.md", "LICENSE", ".gitattributes", "notes.txt"):
        (model_folder / name).write_text("text")
    edit_json(model_folder, "unet/config.json", _name_or_path="elsewhere/model", some_future_key=1)
    (model_folder / "training.json").write_text("{}")
    assert inspect_folder(model_folder).findings == ("training.json belongs to no component and is not used",)


def test_the_flat_layout_of_early_pipelines_passes(model_folder: Path) -> None:
    for path in [*model_folder.glob("unet/*"), *model_folder.glob("scheduler/*")]:
        path.rename(model_folder / path.name)
    for name in ("unet", "scheduler"):
        (model_folder / name).rmdir()
    assert inspect_folder(model_folder).parts["unet"].weights == "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_nothing_there_is_an_input_error(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "empty":
        folder.mkdir()
    if kind == "file":
        folder.write_text("not a folder")
    with pytest.raises(InputError, match="check the path"):
        inspect_folder(folder)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl"])
def test_a_pickle_is_refused_and_not_opened(model_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    (model_folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelRejectedError, match=f"{name} is a pickle"):
        inspect_folder(model_folder)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["pipeline.py", "unet/modeling.py", "a.zip", "a.onnx", "a.so", "noname", "a.json.exe"])
def test_other_formats_are_refused(model_folder: Path, name: str) -> None:
    (model_folder / name).write_bytes(b"x")
    with pytest.raises(ModelRejectedError, match=f"{name} is not of a known format"):
        inspect_folder(model_folder)


@pytest.mark.parametrize("name", ["a\nb.json", "a\\b.json", "a\u202eb.json"])
def test_deceptive_names_are_refused(model_folder: Path, name: str) -> None:
    (model_folder / name).write_text("{}")
    with pytest.raises(ModelRejectedError, match="the file name"):
        inspect_folder(model_folder)


def test_links_are_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(ModelRejectedError, match=r"notes\.txt is a link"):
        inspect_folder(model_folder)


def test_linked_folders_are_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "more.txt").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ModelRejectedError, match=r"more\.txt is a link"):
        inspect_folder(model_folder)


def test_special_files_are_refused(model_folder: Path) -> None:
    os.mkfifo(model_folder / "notes.txt")
    with pytest.raises(ModelRejectedError, match="special file"):
        inspect_folder(model_folder)


@pytest.mark.parametrize(("count", "refused"), [(196, False), (197, True)])
def test_the_number_of_files_is_limited(model_folder: Path, count: int, refused: bool) -> None:
    for index in range(count):
        (model_folder / f"{index}.txt").touch()
    if not refused:
        inspect_folder(model_folder)
        return
    with pytest.raises(ModelRejectedError, match="more than 200 files"):
        inspect_folder(model_folder)


def test_deep_folders_are_refused(model_folder: Path) -> None:
    (model_folder / "a/b/c/d/e").mkdir(parents=True)
    with pytest.raises(ModelRejectedError, match="nested too deeply"):
        inspect_folder(model_folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "1000009 bytes"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key comes twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[]", "holds a list"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"auto_map": {}}', "selects code to run"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_is_not_a_plain_configuration_is_refused(model_folder: Path, content: bytes, words: str) -> None:
    (model_folder / "extra.json").write_bytes(content)
    with pytest.raises(ModelRejectedError, match=words):
        inspect_folder(model_folder)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "names the pipeline 'StableDiffusionPipeline'",
        ),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, "names the pipeline"),
        ("model_index.json", {"_class_name": None}, "names the pipeline"),
        ("model_index.json", {"unet": ["my_module", "UNet2DModel"]}, "unet in model_index.json is"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "unet in model_index.json is"),
        ("model_index.json", {"unet": None}, "names no unet: the network is missing"),
        ("model_index.json", {"unet": [None, None]}, "names no unet: the network is missing"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "EulerDiscreteScheduler"]},
            "scheduler in model_index.json is",
        ),
        ("model_index.json", {"scheduler": ["mine", "DDPMScheduler"]}, "scheduler in model_index.json is"),
        ("model_index.json", {"scheduler": None}, "scheduler in model_index.json is None"),
        ("model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"]}, "is of class 'DDPMScheduler'"),
        ("model_index.json", {"safety": ["transformers", "X"]}, "names the component 'safety'"),
        ("unet/config.json", {"_class_name": "VQModel"}, "is of class 'VQModel'"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is of class 'DDIMScheduler'"),
        ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class-conditional"),
        ("unet/config.json", {"center_input_sample": True}, "value range"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("unet/config.json", {"sample_size": 9}, "multiples of 2"),
        ("unet/config.json", {"sample_size": 10**9}, "sample_size"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"layers_per_block": True}, "layers_per_block"),
        ("unet/config.json", {"layers_per_block": None}, "layers_per_block"),
        ("unet/config.json", {"block_out_channels": [8, "16"]}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [8] * 99}, "block_out_channels"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "down_block_types"),
        ("unet/config.json", {"out_channels": 6}, "in_channels, which is 3"),
        ("unet/config.json", {"act_fn": "os.system"}, "act_fn"),
        ("unet/config.json", {"time_embedding_type": "gaussian"}, "time_embedding_type"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "told 0 to 99; expected positive"),
        (
            "unet/config.json",
            {"time_embedding_type": "learned", "num_train_timesteps": 99},
            "learned embedding has rows",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "its last level is not noise"),
    ],
)
def test_classes_and_configurations_off_the_list_are_refused(model_folder, name, changes, words) -> None:
    edit_json(model_folder, name, **changes)
    with pytest.raises(ModelRejectedError, match=words):
        inspect_folder(model_folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS])
def test_a_missing_part_is_named(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink()
    with pytest.raises(ModelRejectedError, match=r"missing|holds no"):
        inspect_folder(model_folder)


def test_weights_beside_the_scanned_ones_are_refused(model_folder: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, model_folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelRejectedError, match="would not cover"):
        inspect_folder(model_folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_are_refused_by_name(model_folder: Path, value: float, dtype: type) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(model_folder / WEIGHTS).items()}
    save_file(tensors, model_folder / WEIGHTS)
    inspect_folder(model_folder)
    tensors["conv_out.weight"].flat[-1] = value
    save_file(tensors, model_folder / WEIGHTS)
    with pytest.raises(ModelRejectedError, match=r"tensor conv_out\.weight"):
        inspect_folder(model_folder)


def test_the_static_checks_do_not_import_torch(model_folder: Path) -> None:
    code = (
        "import sys, pathlib; from diffdefend_core.loading.static import inspect_folder;"
        "inspect_folder(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(model_folder)], check=False).returncode == 0


def write_header(path: Path, header: object, body: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def one(shape: object = (2,), dtype: object = "F32", offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pad(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def header_bomb(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)


def nested_bomb(path: Path) -> None:
    write_header(path, b'{"a":' + b"[" * 100_000)


WRITERS: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "truncated or padded"),
    (pad, "truncated or padded"),
    (header_bomb, "has a header of 1073741824 bytes"),
    (nested_bomb, "not valid JSON"),
    (lambda path: path.write_bytes(b""), "truncated"),
    (lambda path: path.write_bytes(b"\xff" * 8), "truncated"),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "truncated"),
    (lambda path: write_header(path, b"[]"), "does not begin with"),
    (lambda path: write_header(path, {}), "holds no tensor"),
    (lambda path: write_header(path, one(dtype="I64"), bytes(16)), "of dtype I64"),
    (lambda path: write_header(path, one(dtype=["F32"]), bytes(8)), "of dtype"),
    (lambda path: write_header(path, one(shape=[3]), bytes(8)), "gives tensor 'a' 8 bytes"),
    (lambda path: write_header(path, one(shape=[-2]), bytes(8)), "of shape"),
    (lambda path: write_header(path, one(shape=[2.0]), bytes(8)), "of shape"),
    (lambda path: write_header(path, one(shape=[True, 2]), bytes(8)), "of shape"),
    (lambda path: write_header(path, one(shape=[2**40, 2**40], offsets=[0, 2**82])), "of shape"),
    (lambda path: write_header(path, one(offsets=[8, 16]), bytes(16)), "gap or an overlap"),
    (lambda path: write_header(path, one(offsets=[0]), bytes(8)), "holds tensor 'a' at"),
    (lambda path: write_header(path, {**one(), "b": one()["a"]}, bytes(8)), "gap or an overlap"),
    (lambda path: write_header(path, one(extra=1), bytes(8)), "by other keys"),
    (lambda path: write_header(path, {**one(), "__metadata__": {"a": 1}}, bytes(8)), "metadata that is not text"),
    (lambda path: write_header(path, b'{"a":1,"a":2}'), "a key comes twice"),
]


@pytest.mark.parametrize(("write", "words"), WRITERS)
def test_a_file_that_breaks_the_format_is_refused(
    model_folder: Path, write: Callable[[Path], None], words: str
) -> None:
    write(model_folder / WEIGHTS)
    with pytest.raises(ModelRejectedError, match=words):
        inspect_folder(model_folder)


def test_a_minimal_header_passes(model_folder: Path) -> None:
    write_header(model_folder / WEIGHTS, one(), bytes(8))
    assert inspect_folder(model_folder).parameters == 2
