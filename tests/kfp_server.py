"""A Kubeflow Pipelines server for the tests: the v2beta1 REST API over HTTP, as far as the client calls it.

It answers in the fields of the real API, keeps what it was given, pages its lists, and can be told to fail. With
`play` its runs end by themselves.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_PREFIX = "/apis/v2beta1/"
_CREATED = "2026-01-01T00:00:00Z"


@dataclass
class KfpServer:
    """What the server holds, and how it shall behave.

    `play` is given the model's URI once a run has begun; the run ends as the state that it returns. `most` is the
    largest number of runs that were under way at once.
    """

    url: str = ""
    multi_user: bool = False
    token: str = ""
    page_size: int = 100
    refuse: dict[tuple[str, str], int] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    recurring: list[dict[str, Any]] = field(default_factory=list)
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    play: Callable[[str], str] | None = None
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, run_id: str) -> dict[str, Any]:
        """Return the run of that id."""
        return next(item for item in self.runs if item["run_id"] == run_id)

    def sources(self) -> list[str]:
        """Return the model of each run that was ever started, in order."""
        return [item["runtime_config"]["parameters"]["source"] for item in self.runs]

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a new run and return it."""
        with self.lock:
            made = {**body, "run_id": f"r{len(self.runs)}", "state": "PENDING", "created_at": _CREATED}
            self.runs.append(made)
            self.most = max(self.most, sum(item["state"] == "PENDING" for item in self.runs))
        if self.play is not None:
            threading.Thread(target=self._end, args=(made, self.play), daemon=True).start()
        return made

    def _end(self, run: dict[str, Any], play: Callable[[str], str]) -> None:
        run["state"] = play(run["runtime_config"]["parameters"]["source"])


class _Handler(BaseHTTPRequestHandler):
    state: KfpServer

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _page(self, name: str, held: list[dict[str, Any]], query: dict[str, str]) -> None:
        first = int(query.get("page_token") or 0)
        last = first + min(int(query.get("page_size") or 10), self.state.page_size)
        token = {"next_page_token": str(last)} if last < len(held) else {}
        self._answer({name: held[first:last], **token})

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
        sent = self.headers.get("Content-Type", "").startswith("application/json")
        return path, json.loads(body) if sent and body else {}, query

    def do_GET(self) -> None:
        begun = self._begin("GET")
        if begun is None:
            return
        path, _, query = begun
        kind, _, name = path.partition("/")
        wanted = json.loads(query["filter"])["predicates"][0]["stringValue"] if "filter" in query else None
        if kind == "healthz":
            self._answer({"multi_user": self.state.multi_user})
        elif kind == "experiments":
            self._answer({"experiments": _named(self.state.experiments, wanted)})
        elif kind == "recurringruns":
            held = [item for item in self.state.recurring if item["experiment_id"] == query.get("experiment_id")]
            self._page("recurringRuns", held, query)
        elif kind == "pipelines" and name:
            made = {"pipeline_id": name.partition("/")[0], "pipeline_version_id": "v0", "created_at": _CREATED}
            self._answer({"pipeline_versions": [made]})
        elif kind == "pipelines":
            held = [item for item in self.state.pipelines if item["namespace"] == query.get("namespace", "")]
            self._page("pipelines", _named(held, wanted), query)
        elif kind == "runs" and not name:
            self._page("runs", _named(self.state.runs, wanted)[::-1], query)
        elif kind == "runs":
            self._answer(self.state.run(name))
        else:
            self._answer({"message": f"no {path}"}, 404)

    def do_POST(self) -> None:
        begun = self._begin("POST")
        if begun is None:
            return
        path, body, query = begun
        if path == "experiments":
            made = {**body, "experiment_id": f"e{len(self.state.experiments)}", "created_at": _CREATED}
            self.state.experiments.append(made)
        elif path == "runs":
            made = self.state.start(body)
        elif path.startswith("runs/") and path.endswith(":terminate"):
            made = self.state.run(path.removeprefix("runs/").removesuffix(":terminate"))
            made["state"] = "CANCELED"
        elif path == "pipelines/upload":
            made = {"pipeline_id": f"p{len(self.state.pipelines)}", "display_name": query["name"],
                    "namespace": query.get("namespace", ""), "created_at": _CREATED}  # fmt: skip
            self.state.pipelines.append(made)
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


def _named(held: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    return [item for item in held if name in (None, item["display_name"])]


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
