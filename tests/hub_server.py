"""A repository of the Hugging Face Hub on this machine: as a tree of its cache, and as a small server of its API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "team/tiny"
URI = f"hf://{NAME}@{COMMIT}"


def blob_name(content: bytes, lfs: bool) -> str:
    """Return the name of a file's content: its sha256 in LFS, the sha1 of git otherwise."""
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def write_cache(model: Path, cache: Path) -> Path:
    """Write a model as the library leaves it in its cache, links to blobs included; return the snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    for path in filter(Path.is_file, sorted(model.rglob("*"))):
        content = path.read_bytes()
        blob = blobs / blob_name(content, path.suffix == ".safetensors")
        blob.write_bytes(content)
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


@dataclass
class HubServer:
    """The files of one repository; `served` names those that were asked for."""

    files: dict[str, bytes]
    endpoint: str = ""
    served: list[str] = field(default_factory=list)


@contextmanager
def hub_server(model: Path) -> Iterator[HubServer]:
    """Serve a model folder as the one commit of a repository."""
    names = (path for path in sorted(model.rglob("*")) if path.is_file())
    hub = HubServer({path.relative_to(model).as_posix(): path.read_bytes() for path in names})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, head: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
            return self._send(json.dumps([_item(*file) for file in self.hub.files.items()]).encode(), {}, head)
        name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
        if name not in self.hub.files:
            return self.send_error(404)
        if not head:
            self.hub.served.append(name)
        content = self.hub.files[name]
        tag = blob_name(content, name.endswith(".safetensors"))
        return self._send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, head)

    def _send(self, content: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(content)


def _item(name: str, content: bytes) -> dict[str, object]:
    item = {"type": "file", "path": name, "size": len(content), "oid": blob_name(content, lfs=False)}
    if name.endswith(".safetensors"):
        item["lfs"] = {"oid": blob_name(content, lfs=True), "size": len(content), "pointerSize": 130}
    return item
