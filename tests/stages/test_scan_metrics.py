"""The metrics of a nightly scan: what they say, where they go, and that they change nothing else."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.signed_versions import decided_tags
from diffdefend_core.artifacts import Word
from diffdefend_core.cli import run_command
from diffdefend_core.errors import InputError, RegistryError
from diffdefend_core.gate.signing import read_signer
from diffdefend_core.io import registry
from diffdefend_core.report.registry_document import ScanRow, ScanSummary, Status
from diffdefend_core.stages import scan_metrics
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.scan_metrics import Sink


class Gateway(ThreadingHTTPServer):
    """Plays a Pushgateway: keeps what it is sent, and answers with `status`."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, str, str]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.pushed.append((self.command, self.path, body))  # type: ignore[attr-defined]
        if self.server.status == 0:  # type: ignore[attr-defined]
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> None:
    """A command that ran before in this process may have been quiet."""
    caplog.set_level(logging.WARNING, logger="diffdefend_core")


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def row(version: str, status: Status, verdict: str = "", passed: bool = False) -> ScanRow:
    outcome = ("promoted" if passed else "quarantined") if verdict else ""
    return ScanRow(model="m", version=version, status=status, verdict=verdict, outcome=outcome, passed=passed)


def summary(**changes: Any) -> ScanSummary:
    given: dict[str, Any] = {
        "code_version": "1", "scan": "s", "registry": "http://mlflow:5000", "runner": "local", "policy_digest": "p",
        "config_digest": "c", "only": (), "since": "", "dry_run": False, "resumed": False,
        "started": "2026-01-31T03:00:00Z", "seconds": 12.5, "listed": 5,
        "versions": (
            row("1", Status.SKIPPED, "clean", True), row("2", Status.SCANNED, "clean", True),
            row("3", Status.SCANNED, "backdoored"), row("4", Status.FAILED), row("5", Status.SKIPPED, "inconclusive"),
        ),
    }  # fmt: skip
    return ScanSummary(**{**given, **changes})


def values(text: str) -> dict[str, float]:
    """Return each sample of a text in Prometheus' format: `name{label}` without quotes, and its value."""
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_file_says_what_the_scan_came_to(tmp_path: Path) -> None:
    before = time.time()
    assert Sink(str(tmp_path / "scan.prom")).send(summary(), lambda: 2)
    found = values((tmp_path / "scan.prom").read_text())
    ended = found.pop("diffdefend_scan_last_complete_timestamp_seconds")
    assert before <= ended <= time.time()
    assert found == {
        "diffdefend_scan_versions{skipped}": 2, "diffdefend_scan_versions{scanned}": 2,
        "diffdefend_scan_versions{failed}": 1, "diffdefend_scan_versions{waiting}": 0,
        "diffdefend_scan_verdicts{clean}": 2, "diffdefend_scan_verdicts{backdoored}": 1,
        "diffdefend_scan_verdicts{inconclusive}": 1, "diffdefend_scan_blocked": 2, "diffdefend_scan_seconds": 12.5,
        "diffdefend_scan_unscanned_champions": 2,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["scan.prom"]


def test_a_push_takes_the_place_of_the_last_one_of_the_same_registry(gateway: Gateway) -> None:
    assert Sink(gateway.url).send(summary(), lambda: 0)
    assert Sink(f"{gateway.url}/behind/").send(summary(registry="prod"), lambda: 0)
    (first, where, body), (_, second, _) = gateway.pushed
    assert first == "PUT" and values(body)["diffdefend_scan_versions{scanned}"] == 2
    assert re.fullmatch(r"/metrics/job/diffdefend-scan-registry/registry@base64/[\w=-]+", where)
    assert second == "/behind/metrics/job/diffdefend-scan-registry/registry/prod"


def test_a_registry_that_does_not_answer_is_no_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def silent() -> int:
        raise RegistryError("no answer", expected="one", action="wait")

    assert Sink(str(tmp_path / "scan.prom")).send(summary(), silent)
    assert math.isnan(values((tmp_path / "scan.prom").read_text())["diffdefend_scan_unscanned_champions"])
    assert "cannot be counted: no answer" in caplog.text


@pytest.mark.parametrize("part", [{"only": ("faces",)}, {"since": "7d"}, {"dry_run": True}])
def test_a_part_of_the_registry_does_not_count_as_the_whole(
    tmp_path: Path, part: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert not Sink(str(tmp_path / "scan.prom")).send(summary(**part), lambda: 0)
    assert list(tmp_path.iterdir()) == []
    assert ("no metrics" in caplog.text) == ("dry_run" not in part)


@pytest.mark.parametrize("status", [0, 400, 500])
def test_a_gateway_that_refuses_is_a_warning(gateway: Gateway, status: int, caplog: pytest.LogCaptureFixture) -> None:
    gateway.status = status
    assert not Sink(gateway.url).send(summary(), lambda: 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"did not get to {gateway.url}" in caplog.text


def test_a_gateway_that_is_silent_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import socket

    monkeypatch.setattr(scan_metrics, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert not Sink(f"http://127.0.0.1:{listening.getsockname()[1]}").send(summary(), lambda: 0)
    assert "timed out" in caplog.text


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink(str(tmp_path / "scan.prom"))
    (tmp_path / "scan.prom").mkdir()
    assert not sink.send(summary(), lambda: 0)
    assert "did not get to" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["scan.prom"]


@pytest.mark.parametrize(
    "place",
    ["ftp://gateway", "http://", "http://host:port", "http://[::1", "scan.txt", "gone/scan.prom", "gateway:9091"],
)
def test_a_place_that_cannot_be_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape("--metrics")) as caught:
        Sink(place)
    assert place in str(caught.value)


def test_a_password_in_the_address_is_refused_and_not_told() -> None:
    with pytest.raises(InputError, match="user and a password") as caught:
        Sink("http://ann:hunter2@gateway:9091")
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A real registry: `good`, decided and the champion; `bad`, decided against."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFDEFEND_METRICS", raising=False)
    key = write_key(tmp_path / "keys")
    signer = read_signer(Path(key["private_file"]).read_bytes(), "test")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, word in (("good", Word.CLEAN), ("bad", Word.BACKDOORED)):
        registry.register_source(uri, name, f"s3://m/{name}", decided_tags(signer, f"models:/{name}/1", word=word))
    registry.move_alias(uri, "good", "champion", "1")
    return [
        "--tracking-uri",
        uri,
        "--store",
        f"file://{tmp_path}/store",
        "--set",
        f"signing.trusted_keys={key['public_file']}",
    ]


def test_the_command_sends_what_it_found_and_exits_as_ever(
    flags: list[str], gateway: Gateway, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert run_command(["scan-registry", *flags]) == 1
    monkeypatch.setenv("DIFFDEFEND_METRICS", gateway.url)
    assert run_command(["scan-registry", *flags]) == 1
    found = values(gateway.pushed[0][2])
    assert (found["diffdefend_scan_versions{skipped}"], found["diffdefend_scan_blocked"]) == (2, 1)
    assert found["diffdefend_scan_unscanned_champions"] == 0
    gateway.status = 500
    capfd.readouterr()
    assert run_command(["scan-registry", "-o", "json", *flags]) == 1
    assert json.loads(capfd.readouterr().out)["counts"]["skipped"] == 2 and "did not get to" in caplog.text


def test_a_wrong_place_shows_before_the_scan(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["scan-registry", "--metrics", "gone/scan.prom", *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "is no place for metrics" in err and not (tmp_path / "store").exists()


def test_without_its_library_the_command_says_what_to_install(
    flags: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "diffdefend_core.stages.scan_metrics", raising=False)
    assert run_command(["scan-registry", "--metrics", "scan.prom", *flags]) == 2
    assert "pip install 'diffdefend[webhook]'" in capfd.readouterr().err
