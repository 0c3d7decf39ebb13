"""New signing keys as files."""

from __future__ import annotations

import os
from pathlib import Path

from diffdefend_core.errors import InputError
from diffdefend_core.gate.signing import generate_key

PRIVATE_FILE = "signing-key.pem"


def write_key(folder: Path) -> dict[str, str]:
    """Make a key pair in `folder` and return `key_id`, `private_file`, `public_file` and `public_key` (PEM).

    The private file has the mode 0600 from the start; a new folder has 0700. Raises InputError if the folder holds a
    private key already or cannot be written.
    """
    private = folder / PRIVATE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise InputError(
            f"{private if folder.is_dir() else folder} is there already",
            expected="a folder without a private key",
            action="name another folder with --to; a key that is replaced cannot be brought back",
        ) from error
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror})", expected="a folder of yours", action="name another one"
        ) from error
    made = generate_key()
    with os.fdopen(handle, "wb") as file:
        file.write(made.private_pem)
    public = folder / f"{made.key_id[:16]}.pub"
    public.write_bytes(made.public_pem)
    return {
        "key_id": made.key_id,
        "private_file": str(private),
        "public_file": str(public),
        "public_key": made.public_pem.decode(),
    }
