"""Small random damage to a model folder: to fields, headers, offsets, weights, bytes and file names. Seeded."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 16, 32, 255, 65536, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 0.5, 1e-320,
    1e308, -1e308, "", "0", "null", "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "UNet2DModel", "epsilon", "sample",
    "linear", "fourier", "learned", "silu", "os.system", "../../etc/passwd", "\x00", "\ud800", "\u202e", "x" * 70_000,
    [], {}, [[]], [None], [0], [8, 16], [8, 16, 32], ["diffusers", "UNet2DModel"], ["os", "system"], [1] * 10_001,
    {"a": 1}, {"auto_map": {"AutoModel": "evil.Model"}}, {"_class_name": "UNet2DModel"},
)  # fmt: skip
TEXTS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 5000,
    "[" * 5000,
    '{"a":' * 5000,
    '"\\ud800"',
    "01",
    "",
)
NAMES = (
    "a.bin", "a.pt", "a.ckpt", "a.pkl", "evil.py", "..", "...", "a\nb.json", "a\\b.json", "\u202egnp.json", "CON.json",
    "model_index.json ", "Model_Index.json", "m\u043edel_index.json", "<img src=x onerror=alert(1)>.json",
    "a" * 250 + ".json",
    "a.safetensors", "diffusion_pytorch_model.fp16.safetensors", "config.json", ".hidden.json", "a.json.exe",
    "-rf.json",
    "$(touch x).json", "{{7*7}}.json", "notes.md", "LICENSE", "\udcff.json",
)  # fmt: skip
SIZES = (0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, -1)
DTYPES = ("F16", "BF16", "F32", "F64", "I64", "F8_E4M3", "BOOL", "f32", "", "U8", None, 4)

Mutation = Callable[[Path, random.Random], None]


def mutate(folder: Path, draw: random.Random) -> list[str]:
    """Damage the folder by one to three mutations; return their kinds."""
    kinds = draw.choices(sorted(MUTATIONS), k=draw.choice((1, 1, 1, 2, 3)))
    for kind in kinds:
        MUTATIONS[kind](folder, draw)
    return kinds


def change_field(folder: Path, draw: random.Random) -> None:
    """Replace, drop, add or double a field at any depth of a configuration, or put raw text in its place."""
    path = _pick(folder, ".json", draw)
    if path is None:
        return
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return change_bytes(folder, draw)
    places = list(_places(value))
    if not places:
        return
    holder, key = draw.choice(places)
    action = draw.choice(("set", "set", "set", "drop", "add", "raw", "double", "nudge"))
    if action == "drop":
        holder.pop(key)
    elif action == "add" and isinstance(holder, dict):
        holder[draw.choice(("auto_map", "custom_pipelines", "_class_name", "num_class_embeds", "x"))] = draw.choice(
            VALUES
        )
    elif action == "nudge" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = draw.choice((holder[key] + 1, holder[key] * 2, -holder[key], holder[key] / 2, str(holder[key])))
    elif action in ("raw", "double"):
        holder[key] = "@@@"
        text = json.dumps(value)
        new = draw.choice(TEXTS) if action == "raw" else f"1, {json.dumps(str(key))}: 2"
        path.write_text(text.replace('"@@@"', new), encoding="utf-8")
        return
    else:
        holder[key] = draw.choice(VALUES)
    path.write_text(json.dumps(value), encoding="utf-8")


def change_header(folder: Path, draw: random.Random) -> None:
    """Change dtype, shape, offsets, name, keys or metadata in a safetensors header, or the length before it."""
    path = _pick(folder, ".safetensors", draw)
    header, body = _split(path)
    if path is None or header is None:
        return
    name = draw.choice(sorted(header))
    entry = header[name]
    action = draw.choice(("dtype", "shape", "offsets", "rename", "drop", "key", "metadata", "copy", "swap", "length"))
    if action == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif action == "shape" and isinstance(entry.get("shape"), list):
        _change_list(entry["shape"], draw)
    elif action == "offsets" and isinstance(entry.get("data_offsets"), list):
        _change_list(entry["data_offsets"], draw)
    elif action == "rename":
        header[draw.choice(("", "x", "\u202e", "\ud800", "a" * 1000, "<script>", name + " "))] = header.pop(name)
    elif action == "drop":
        header.pop(name)
    elif action == "key":
        entry[draw.choice(("dtype", "shape", "data_offsets", "more"))] = draw.choice(VALUES)
    elif action == "metadata":
        header["__metadata__"] = draw.choice(({"a": 1}, [], None, {"a": "b"}, {"a": {"b": "c"}}, "x"))
    elif action == "copy":
        header[name + "2"] = dict(entry)
    elif action == "swap":
        other = draw.choice(sorted(header))
        header[name], header[other] = header[other], header[name]
    length = draw.choice(SIZES) if action == "length" else None
    _join(path, header, body, length, draw)


def change_weights(folder: Path, draw: random.Random) -> None:
    """Overwrite numbers among the weights: not finite, huge, or any."""
    path = _pick(folder, ".safetensors", draw)
    header, body = _split(path)
    if path is None or header is None or len(body) < 8:
        return
    value = draw.choice((float("nan"), float("inf"), float("-inf"), 1e38, 0.0, draw.gauss(0, 1)))
    place = draw.randrange(len(body) // 4) * 4
    changed = bytearray(body)
    changed[place : place + 4] = struct.pack("<f", value)
    _join(path, header, bytes(changed), None, draw)


def change_bytes(folder: Path, draw: random.Random) -> None:
    """Flip, overwrite, cut, double, insert or append bytes of any file; more often near its beginning."""
    path = _pick(folder, "", draw)
    if path is None:
        return
    content = bytearray(path.read_bytes())
    reach = min(len(content), draw.choice((8, 64, 4096, 1 << 30)))
    place, length = draw.randrange(reach + 1), draw.choice((1, 2, 8, 64))
    action = draw.choice(("flip", "flip", "over", "cut", "insert", "append", "double", "drop"))
    if action == "flip" and content:
        content[min(place, len(content) - 1)] ^= 1 << draw.randrange(8)
    elif action == "over":
        content[place : place + length] = draw.randbytes(length)
    elif action == "cut":
        del content[place:]
    elif action == "insert":
        content[place:place] = draw.randbytes(length)
    elif action == "append":
        content += draw.choice((b"\0", b"\n", b"PK\x03\x04", draw.randbytes(length)))
    elif action == "double":
        content[place:place] = content[place : place + length]
    else:
        del content[place : place + length]
    path.write_bytes(bytes(content))


def change_names(folder: Path, draw: random.Random) -> None:
    """Rename, add, drop, link or nest files."""
    path = _pick(folder, "", draw)
    if path is None:
        return
    action = draw.choice(("rename", "add", "add", "drop", "link", "pipe", "nest", "fold", "move"))
    name = draw.choice(NAMES)
    target = path.parent / (name if name not in ("..", "...") else "dots" + name)
    if action in ("rename", "move"):
        os.replace(path, target if action == "rename" else folder / path.name)
    elif action == "add" and not os.path.lexists(target):
        target.write_bytes(draw.choice((b"{}", b"", b"\x80\x02.", b"[]", b"text")))
    elif action == "drop":
        path.unlink()
    elif action == "link":
        path.unlink()
        path.symlink_to(draw.choice(("/etc/passwd", "/dev/zero", "model_index.json", "..", "nowhere")))
    elif action == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif action == "nest":
        (folder / "/".join(["n"] * draw.choice((1, 3, 4, 60)))).mkdir(parents=True, exist_ok=True)
    elif action == "fold":
        path.unlink()
        path.mkdir()


MUTATIONS: dict[str, Mutation] = {
    "field": change_field,
    "header": change_header,
    "weights": change_weights,
    "bytes": change_bytes,
    "names": change_names,
}


def _pick(folder: Path, suffix: str, draw: random.Random) -> Path | None:
    """Return a plain file of the folder whose name ends in `suffix`, if there is one."""
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(suffix) and path.is_file())
    plain = [path for path in found if not path.is_symlink()]
    return draw.choice(plain) if plain else None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (holder, key) of every value below a JSON value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, item in items for place in _places(item)]


def _change_list(numbers: list[Any], draw: random.Random) -> None:
    place = draw.randrange(len(numbers) + 1)
    if place < len(numbers) and draw.random() < 0.8:
        old = numbers[place]
        near = old + draw.choice((-4, -1, 1, 4)) if isinstance(old, int) else 0
        numbers[place] = draw.choice((near, near, *SIZES, 1.0, "1", None))
    else:
        numbers.insert(place, draw.choice(SIZES))


def _split(path: Path | None) -> tuple[dict[str, Any] | None, bytes]:
    """Return the header and the body of a safetensors file; None for the header of what is no such file."""
    content = path.read_bytes() if path is not None else b""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None, b""
    ok = isinstance(header, dict) and header and all(isinstance(entry, dict) for entry in header.values())
    return (header, content[8 + length :]) if ok else (None, b"")


def _join(path: Path, header: dict[str, Any], body: bytes, length: int | None, draw: random.Random) -> None:
    text = json.dumps(header, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + body)
