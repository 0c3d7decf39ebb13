"""Runs of a scan on a fake KFP server that the real client talks to."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffdefend_core.config import load_settings
from diffdefend_core.errors import InputError, RegistryError
from diffdefend_core.stages.dispatch import Job
from pipelines.kfp_runs import KfpRuns

JOB = Job(name="faces", version="3")


class Fake(http.server.BaseHTTPRequestHandler):
    """Holds pipelines and runs; a run's state is what the test sets."""

    pipelines: list[dict[str, Any]]
    runs: dict[str, dict[str, Any]]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        wanted = json.loads(urllib.parse.parse_qs(query).get("filter", ["{}"])[0])
        names = [item.get("stringValue") or item.get("string_value") for item in wanted.get("predicates", [])]
        if path.endswith("/healthz"):
            self.answer({"multi_user": False})
        elif path.endswith("/versions"):
            self.answer({"pipeline_versions": [{"pipeline_id": "p1", "pipeline_version_id": "v1"}]})
        elif path.endswith("/pipelines"):
            self.answer({"pipelines": [item for item in self.pipelines if item["display_name"] in names]})
        elif path.endswith("/experiments"):
            self.answer({"experiments": [{"experiment_id": "e1", "display_name": "diffdefend"}]})
        elif path.endswith("/runs"):
            self.answer({"runs": [run for run in self.runs.values() if run["display_name"] in names]})
        else:
            self.answer(self.runs[path.rpartition("/")[2]])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        if path.endswith("/pipelines/upload"):
            name = urllib.parse.parse_qs(query)["name"][0]
            self.pipelines.append({"pipeline_id": "p1", "display_name": name})
            self.answer(self.pipelines[-1])
        elif path.endswith("/experiments"):
            self.answer({"experiment_id": "e1", "display_name": "diffdefend"})
        elif path.endswith(":terminate"):
            self.runs[path.rpartition("/")[2].partition(":")[0]]["state"] = "CANCELED"
            self.answer({})
        else:
            run = {**json.loads(body), "run_id": f"r{len(self.runs) + 1}", "state": "PENDING"}
            self.runs[run["run_id"]] = run
            self.answer(run)

    def answer(self, document: Any) -> None:
        text = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def fake() -> Iterator[tuple[str, type[Fake]]]:
    handler = type("Handler", (Fake,), {"pipelines": [], "runs": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_a_version_is_one_run_that_a_restarted_scan_finds_again(
    fake: tuple[str, type[Fake]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host, held = fake
    settings = load_settings(store="s3://bucket/store", tracking_uri="http://mlflow:5000")
    runs = KfpRuns(settings, host)
    first = runs.begin(JOB)
    assert runs.outcome(first) is None
    assert KfpRuns(settings, host).begin(JOB) == first, "another controller takes it over"
    assert runs.begin(Job(name="faces", version="4")) != first
    parameters = held.runs[first]["runtime_config"]["parameters"]
    assert (parameters["source"], parameters["store"]) == ("models:/faces/3", settings.store)
    assert parameters["settings"] == settings.science_json() and len(held.pipelines) == 1
    held.runs[first]["state"] = "SUCCEEDED"
    assert runs.outcome(first) == ""
    second = runs.begin(JOB)
    assert second != first
    held.runs[second] |= {"state": "FAILED", "error": {"code": 13, "message": "no GPU"}}
    assert "FAILED: no GPU" in str(runs.outcome(second))
    third = runs.begin(JOB)
    runs.stop(third)
    assert held.runs[third]["state"] == "CANCELED"
    assert capsys.readouterr().out == ""


def test_what_cannot_work_is_said_at_once() -> None:
    settings = load_settings(store="s3://bucket/store")
    for host in ("ml-pipeline:8888", "http://user:secret@host"):
        with pytest.raises(InputError) as caught:
            KfpRuns(settings, host)
        assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="s3://"):
        KfpRuns(load_settings(), "http://host")
    with pytest.raises(RegistryError, match="no answer"):
        KfpRuns(settings, "http://127.0.0.1:9").outcome("r1")
