"""A Kubeflow Pipelines server for the tests: the v2beta1 REST API over HTTP, as far as the client calls it.

It answers in the fields of the real API, keeps what it was given, pages its lists, and can be told to fail.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_PREFIX = "/apis/v2beta1/"
_CREATED = "2026-01-01T00:00:00Z"


@dataclass
class KfpServer:
    """What the server holds, and how it shall behave."""

    url: str = ""
    multi_user: bool = False
    token: str = ""
    page_size: int = 100
    refuse: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    recurring: list[dict[str, Any]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    state: KfpServer

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, method: str) -> tuple[str, dict[str, Any], dict[str, str]] | None:
        """Return resource, body and query; None if the request was refused."""
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = parts.path.removeprefix(_PREFIX)
        self.state.calls.append((method, path))
        code = self.state.refuse.get((method, path.split("/")[0]))
        if self.state.token and self.headers.get("authorization") != f"Bearer {self.state.token}":
            code = 401
        if code:
            self._answer({"error": "told to refuse", "code": 16, "message": f"told to refuse {path}"}, code)
            return None
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        return path, json.loads(body) if body else {}, query

    def do_GET(self) -> None:
        begun = self._begin("GET")
        if begun is None:
            return
        path, _, query = begun
        kind, _, name = path.partition("/")
        if kind == "healthz":
            self._answer({"multi_user": self.state.multi_user})
        elif kind == "experiments":
            wanted = json.loads(query["filter"])["predicates"][0]["stringValue"] if "filter" in query else None
            held = [item for item in self.state.experiments if item["display_name"] == wanted]
            self._answer({"experiments": held})
        elif kind == "recurringruns":
            held = [item for item in self.state.recurring if item["experiment_id"] == query.get("experiment_id")]
            first = int(query.get("page_token") or 0)
            last = first + min(int(query.get("page_size") or 10), self.state.page_size)
            token = {"next_page_token": str(last)} if last < len(held) else {}
            self._answer({"recurringRuns": held[first:last], **token})
        elif kind == "runs":
            self._answer(next(item for item in self.state.runs if item["run_id"] == name))
        else:
            self._answer({"message": f"no {path}"}, 404)

    def do_POST(self) -> None:
        begun = self._begin("POST")
        if begun is None:
            return
        path, body, _ = begun
        if path == "experiments":
            made = {**body, "experiment_id": f"e{len(self.state.experiments)}", "created_at": _CREATED}
            self.state.experiments.append(made)
        elif path == "runs":
            made = {**body, "run_id": f"r{len(self.state.runs)}", "state": "PENDING", "created_at": _CREATED}
            self.state.runs.append(made)
        elif path == "recurringruns":
            made = {**body, "recurring_run_id": f"rr{len(self.state.calls)}", "status": "ENABLED"}
            self.state.recurring.append(made)
        else:
            self._answer({"message": f"no {path}"}, 404)
            return
        self._answer(made)

    def do_DELETE(self) -> None:
        begun = self._begin("DELETE")
        if begun is None:
            return
        name = begun[0].rpartition("/")[2]
        self.state.recurring[:] = [item for item in self.state.recurring if item["recurring_run_id"] != name]
        self._answer({})

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def kfp_server() -> Iterator[KfpServer]:
    """Serve on a free port of 127.0.0.1 while the context is open."""
    state = KfpServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
