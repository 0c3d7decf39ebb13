"""The reading half of a store over a Hugging Face repository at one commit: from the local cache, or from the network.

A branch or a tag may point elsewhere tomorrow, so only a full commit hash names a model. What is read is compared with
the digest by which git or LFS names it.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from diffdefend_core.errors import InputError, MissingExtraError, StoreError
from diffdefend_core.io.store import CHUNK, MAX_ENTRIES, Entry

SCHEME = "hf://"
_URI = re.compile(r"hf://(?P<name>[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96})@(?P<commit>[0-9a-f]{40})/?")
_GIT, _LFS = "git", "sha256"


def open_hub(uri: str, *, network: bool) -> HubStore:
    """Return the repository that `hf://organisation/name@commit` names; `network` allows downloads from the Hub.

    Raises InputError at any other form of URI, MissingExtraError without huggingface_hub.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise InputError(
            f"the URI is {uri[:200]!r}",
            expected="hf://organisation/name@commit with a commit hash of 40 hex digits, as branches and tags move",
            action="take the hash from the page of the repository's commits",
        )
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "huggingface_hub is not installed",
            expected="the client of the Hugging Face Hub",
            action="pip install 'diffdefend[hub]'",
        ) from error
    return (_Remote if network else _Cached)(match["name"], match["commit"])


class HubStore(ABC):
    """The files of a repository at one commit, under their paths; nothing can be written."""

    def __init__(self, name: str, commit: str) -> None:
        """Take `organisation/name` and a commit hash."""
        self.name, self.commit = name, commit
        self._tags: dict[str, str] = {}

    def entries(self, prefix: str = "", limit: int = MAX_ENTRIES) -> list[Entry]:
        """Return at most `limit` files whose path begins with `prefix`, sorted. Raises StoreError."""
        with self._translated():
            named = (entry for entry in self._list() if entry.key.startswith(prefix))
            found = sorted(islice(named, limit), key=lambda entry: entry.key)
        self._tags |= {entry.key: entry.tag for entry in found}
        return found

    def read(self, key: str) -> Iterator[bytes]:
        """Yield a file in pieces. Raises StoreError at its end if it is not what the commit says."""
        with self._translated():
            path = self._file(key)
            kind, _, wanted = self._tags.get(key, "").partition(":")
            digest = hashlib.sha256() if kind == _LFS else hashlib.sha1(usedforsecurity=False)
            if kind == _GIT:
                digest.update(b"blob %d\0" % path.stat().st_size)
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    yield chunk
        if wanted and digest.hexdigest() != wanted:
            raise self._failed(f"{key} is not the file of that commit", "try again, or clear it from the local cache")

    @abstractmethod
    def _list(self) -> Iterator[Entry]:
        """Yield every file of the commit."""

    @abstractmethod
    def _file(self, key: str) -> Path:
        """Return the local path of a file."""

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from huggingface_hub import errors

        # the class of the HTTP library underneath, which has changed from version to version
        http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
        try:
            yield
        except StoreError:
            raise
        except errors.OfflineModeIsEnabled as error:
            raise self._failed("the Hub is switched off by HF_HUB_OFFLINE", "unset it for this step") from error
        except (errors.LocalEntryNotFoundError, FileNotFoundError) as error:
            raise self._failed(
                "it is not, or not whole, in the local cache",
                "fetch it into the cache before, or allow the network with --allow-network",
            ) from error
        except (OSError, ValueError, http_error, errors.EntryNotFoundError) as error:
            first = next(iter(str(error).strip().splitlines()), "no message")[:160]
            raise self._failed(
                f"{type(error).__name__}: {first}", "check name, commit, HF_ENDPOINT, network and access"
            ) from error

    def _failed(self, reason: str, action: str) -> StoreError:
        return StoreError(
            f"{SCHEME}{self.name}@{self.commit}: {reason}", expected="a repository that can be read", action=action
        )


class _Cached(HubStore):
    """A snapshot in the local cache, as the tools of Hugging Face leave it; nothing is looked up elsewhere."""

    def _list(self) -> Iterator[Entry]:
        from huggingface_hub import snapshot_download

        self._root = Path(
            snapshot_download(
                self.name,
                revision=self.commit,
                cache_dir=_cache(),
                local_files_only=True,
                allow_patterns=["*.json", "*.safetensors"],
            )
        )
        for folder, _, files in os.walk(self._root, followlinks=False, onerror=_raise):
            for name in files:
                key = (Path(folder) / name).relative_to(self._root).as_posix()
                path = self._file(key)
                yield Entry(key=key, size=path.stat().st_size, tag=_blob_tag(path.name))

    def _file(self, key: str) -> Path:
        """Follow the one link of the cache, from the snapshot to the repository's own blobs."""
        path = (self._root / key).resolve(strict=True)
        if not path.is_file() or not path.is_relative_to(self._root.parent.parent.resolve()):
            raise self._failed(f"{key[:80]!r} leads out of the local cache", "clear the repository from the cache")
        return path


class _Remote(HubStore):
    """A repository on the Hub, or at `HF_ENDPOINT`; its files pass through the local cache."""

    def _list(self) -> Iterator[Entry]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        tree = HfApi(endpoint=_endpoint()).list_repo_tree(self.name, revision=self.commit, recursive=True)
        for item in tree:
            if isinstance(item, RepoFile):
                tag = f"{_LFS}:{item.lfs.sha256}" if item.lfs is not None else f"{_GIT}:{item.blob_id}"
                yield Entry(key=item.path, size=item.size, tag=tag)

    def _file(self, key: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        return Path(hf_hub_download(self.name, key, revision=self.commit, cache_dir=_cache(), endpoint=_endpoint()))


def _blob_tag(name: str) -> str:
    """Return what a blob of the cache must be, by its name: LFS names files by sha256, git by its own sha1."""
    kind = {64: _LFS, 40: _GIT}.get(len(name)) if re.fullmatch(r"[0-9a-f]+", name) else None
    return f"{kind}:{name}" if kind else ""


def _cache() -> str | None:
    return os.environ.get("HF_HUB_CACHE") or None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _raise(error: OSError) -> None:
    raise error
