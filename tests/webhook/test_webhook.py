"""The receiver behind a real server, with deliveries that MLflow itself signs."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings
from diffdefend_core.io import registry
from diffdefend_core.stages.dispatch import Job
from diffdefend_core.webhook.app import build_app
from diffdefend_core.webhook.deliveries import Deliveries
from diffdefend_core.webhook.metrics import Metrics
from diffdefend_core.webhook.queue import WorkQueue

SECRET = "0123456789abcdef0123456789abcdef"


class Refuses:
    """A runner whose every run ends at once with an error."""

    kind, lasting, interval = "played", False, 0.01

    def __init__(self) -> None:
        self.begun: list[Job] = []

    def begin(self, job: Job) -> str:
        self.begun.append(job)
        return job.uri

    def outcome(self, run: str) -> str | None:
        return "broken"

    def stop(self, run: str) -> None: ...


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Refuses]]:
    import uvicorn

    place, runner, metrics = tmp_path_factory.mktemp("hook"), Refuses(), Metrics()
    settings = Settings(store=f"file://{place}/store", tracking_uri=f"sqlite:///{place}/mlflow.db")
    registry.register_source(settings.tracking_uri, "faces", "s3://m/faces", {registry.DIGEST_TAG: "x"})
    queue = WorkQueue(settings, runner, metrics, jobs=2, limit=60.0)
    app = build_app(Deliveries(SECRET), queue, metrics)
    served = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    queue.start()
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}", runner
    served.should_exit = True
    thread.join()
    queue.stop()


def event(entity: str = "model_version", name: str = "faces", version: object = "1") -> str:
    return json.dumps({"entity": entity, "action": "created", "data": {"name": name, "version": version}})


def deliver(
    url: str, body: str, delivery: str, *, age: float = 0, secret: str = SECRET, **change: str
) -> tuple[int, Any]:
    stamp = str(int(time.time() - age))
    headers = {
        "X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": _generate_hmac_signature(secret, delivery, stamp, body), **change,
    }  # fmt: skip
    request = urllib.request.Request(f"{url}/webhook", data=body.encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_delivery_of_mlflow_is_worked_on_once(server: tuple[str, Refuses]) -> None:
    url, runner = server
    assert deliver(url, event(), "one") == (200, {"answer": "queued"})
    assert deliver(url, event(), "one") == (200, {"answer": "duplicate"})
    while b"diffdefend_failures_total 1.0" not in urllib.request.urlopen(f"{url}/metrics").read():
        time.sleep(0.02)
    assert runner.begun == [Job(name="faces", version="1")]
    with urllib.request.urlopen(f"{url}/healthz") as answer:
        assert json.load(answer) == {"alive": True}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"secret": "another"}, 401),
        ({"X-MLflow-Delivery-Id": "other"}, 401),
        ({"X-MLflow-Timestamp": "1"}, 401),
        ({"X-MLflow-Signature": "v1,AAAA"}, 401),
        ({"age": 400}, 400),
        ({"age": -400}, 400),
    ],
)
def test_what_mlflow_did_not_sign_now_is_refused(server: tuple[str, Refuses], change: Any, status: int) -> None:
    url, runner = server
    before = len(runner.begun)
    assert deliver(url, event(), "refused", **change)[0] == status
    assert len(runner.begun) == before


def test_tags_and_strange_bodies_start_nothing(server: tuple[str, Refuses]) -> None:
    url, _ = server
    assert deliver(url, event("model_version_tag"), "tag")[1] == {"answer": "ignored"}
    for number, body in enumerate(("[]", "no json", event(version="1/../2"), event(name="a/b"), event(name="x" * 300))):
        assert deliver(url, body, f"strange-{number}")[0] == 400
    assert deliver(url, " " * ((1 << 20) + 1), "long")[0] == 413


def test_without_a_secret_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for value, said in (("", "is not set"), ("short", "is shorter")):
        monkeypatch.setenv("DIFFDEFEND_WEBHOOK_SECRET", value)
        assert run_command(["serve-webhook"]) == 2
        assert said in capsys.readouterr().err
