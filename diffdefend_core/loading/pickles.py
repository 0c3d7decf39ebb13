"""Legacy weights, where the settings allow them: checked, read in a process of its own, saved anew as safetensors.

Only archives that `torch.save` writes are taken. Three things must agree before a tensor is made: the archive is as
plain as torch writes it and its one pickle can be disassembled to its end; picklescan in strict mode has read that
pickle and found no import but those of tensors; `torch.load(weights_only=True)` reads it. A scanner by itself would not
do, because picklescan passes what it cannot parse. torch never sees the archive of the model: it gets one that was
written here from the members that were checked, so that no two readers can see two archives in one file. No torch in
this process.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickletools
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdefend_core.artifacts import FileDigest
from diffdefend_core.errors import MissingExtraError, ModelRejectedError
from diffdefend_core.loading.formats import TORCH_PICKLES

MAX_PICKLE = 2 << 20
MAX_DIRECTORY = 4 << 20
MAX_MEMBERS = 20_000
BASE_SECONDS = 120.0
MEGABYTES_PER_SECOND = 10
SCRIPT = Path(__file__).with_name("unpickle.py")

_MEMBER = re.compile(
    r"(?P<root>[A-Za-z0-9_.-]+)/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]{1,9})"
)
# what the process of torch may know: where programs and libraries are
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")


def convert_pickles(folder: Path) -> tuple[FileDigest, ...]:
    """Replace each torch pickle in a model folder by safetensors of the same name; return what the pickles were.

    `folder` is a private copy. Raises ModelRejectedError at anything but a clean pass, and when there are safetensors
    of that name already; MissingExtraError without picklescan or torch.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix in TORCH_PICKLES and path.is_file())
    return tuple(_convert(folder, path) for path in found)


def finding_of(pickle: FileDigest) -> str:
    """Return the remark about a pickle that passed."""
    return (
        f"the weights came from a pickle, {pickle.path} (sha256 {pickle.sha256}): picklescan found nothing,"
        " torch.load(weights_only=True) read it, and it was saved anew as safetensors"
    )


def scan_pickle(path: Path) -> list[str]:
    """Return what the pickle of a torch archive imports, as sorted `module.name`; nothing of it is run.

    Raises ModelRejectedError unless the archive is plain, its pickle whole, and picklescan's strict pass clean.
    """
    with _blaming(path), zipfile.ZipFile(path) as archive:
        return _scan(path, archive, _members(path, archive))


def _convert(folder: Path, path: Path) -> FileDigest:
    target = path.with_suffix(".safetensors")
    if target.exists():
        raise _rejected(path, f"lies beside {target.name}: which of them would be used is not certain")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    pickle = FileDigest(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=digest)
    clean = path.with_name("checked.zip")
    with _blaming(path), zipfile.ZipFile(path) as archive:
        members = _members(path, archive)
        _scan(path, archive, members)
        _write_anew(archive, members, clean)
    path.unlink()
    _unpickle(path, clean, target)
    clean.unlink()
    return pickle


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the members of an archive that is as plain as torch writes it."""
    members, names = archive.infolist(), archive.namelist()
    matches = [_MEMBER.fullmatch(name) for name in names]
    roots = {match["root"] if match else "" for match in matches}
    if not all(matches) or len(roots) != 1 or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise _rejected(path, "holds other members than those of one saved dictionary of weights")
    if len(set(names)) != len(names):
        raise _rejected(path, "holds two members of one name")
    if any(
        item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1 or item.file_size != item.compress_size
        for item in members
    ):
        raise _rejected(path, "holds compressed or encrypted members")
    if sum(item.file_size for item in members) > path.stat().st_size:
        raise _rejected(path, "holds members that overlap")
    return members


def _check_end(path: Path) -> None:
    """Bound the table of contents before `zipfile` reads it: its size is whatever the file says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(max(0, size - 98))
        tail = file.read()
    if magic != b"PK\x03\x04" or len(tail) < 98 or tail[-22:-18] != b"PK\x05\x06":
        raise _rejected(path, "is no archive of torch.save, or has bytes before or after it")
    entries, length = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":
        entries, length = struct.unpack("<QQ", tail[32:48])
    if entries > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise _rejected(path, f"has a table of contents of {entries} members and {length} bytes")


def _scan(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> list[str]:
    item = next(item for item in members if item.filename.endswith("/data.pkl"))
    if item.file_size > MAX_PICKLE:
        raise _rejected(path, f"holds a pickle of {item.file_size} bytes, more than {MAX_PICKLE}")
    content = archive.read(item)
    imports = _strict_pass(path, content)
    # picklescan takes what it cannot parse for no pickle at all, and passes it
    end = max(position or 0 for _, _, position in pickletools.genops(content))
    if end != len(content) - 1:
        raise _rejected(path, "holds something after its pickle")
    return imports


def _strict_pass(path: Path, content: bytes) -> list[str]:
    try:
        from picklescan.scanner import SafetyLevel, scan_pickle_bytes
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "picklescan is not installed",
            expected="the scanner without which no pickle is read",
            action="pip install 'diffdefend[pickles]'",
        ) from error
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    result = scan_pickle_bytes(io.BytesIO(content), path.name, strict=True)
    bad = sorted(f"{item.module}.{item.name}" for item in result.globals if item.safety is not SafetyLevel.Innocuous)
    if bad:
        raise _rejected(path, f"imports {', '.join(bad)[:200]!r}, which a dictionary of weights does not need")
    if result.issues_count or result.suspicious_count or result.scan_err or result.scanned_files != 1:
        raise _rejected(path, "did not pass picklescan")
    return sorted(f"{item.module}.{item.name}" for item in result.globals)


def _write_anew(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], target: Path) -> None:
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED) as copy:
        for item in members:
            with archive.open(item) as source, copy.open(f"model/{item.filename.partition('/')[2]}", "w") as file:
                while piece := source.read(1 << 20):
                    file.write(piece)


def _unpickle(path: Path, archive: Path, target: Path) -> None:
    """Let a process of its own read the archive: no credentials, and its memory and time are bounded."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    seconds = BASE_SECONDS + archive.stat().st_size / (MEGABYTES_PER_SECOND * 10**6)
    command = [sys.executable, "-I", str(SCRIPT), str(archive), str(target)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _rejected(path, f"was not read within {seconds:.0f} seconds") from error
    reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"the process ended with code {done.returncode}")
    if "No module named" in reason:
        raise MissingExtraError(
            f"torch and safetensors are needed to read the pickle {path.name}",
            expected="the extra [torch]",
            action="pip install 'diffdefend[torch]', or convert the model elsewhere",
        )
    if done.returncode != 0 or not target.is_file():
        raise _rejected(path, f"was refused by torch.load(weights_only=True): {reason[:200]!r}")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever the readers raise inside into a refusal."""
    _check_end(path)
    try:
        yield
    except (ModelRejectedError, MissingExtraError):
        raise
    # Readers of hostile bytes may raise anything; whatever it is, it is no clean pass.
    except Exception as error:
        raise _rejected(path, f"cannot be read ({type(error).__name__}: {str(error)[:120]!r})") from error


def _rejected(path: Path, what: str) -> ModelRejectedError:
    return ModelRejectedError(
        f"the pickle {path.name} {what}",
        expected="a dictionary of tensors as torch.save has written it since version 1.6",
        action="convert it to safetensors where you trust it, otherwise do not use this model",
    )
