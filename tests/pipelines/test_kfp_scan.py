"""A scan on a cluster whose controller is killed: real MLflow, S3 and kfp client; the runs go on without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp_server import KfpServer, kfp_server
from s3_server import S3Server

from benchmarks.signed_versions import decided_tags
from diffdefend_core.gate.signing import read_signer
from diffdefend_core.io import registry
from diffdefend_core.stages.keys import write_key

ROOT = Path(__file__).parents[2]
CAP, VERSIONS, BROKEN = 3, 10, "models:/faces/6"
CONTROLLER = """
import json, sys
from diffdefend_core.config import load_settings
from diffdefend_core.report.registry_document import render_json
from diffdefend_core.stages.registry_scan import Request, scan_registry
from pipelines.cluster import Cluster
from pipelines.kfp_runs import KfpRuns
from pipelines.placement import Placement
host, cap, settings = sys.argv[1], int(sys.argv[2]), load_settings(**json.loads(sys.argv[3]))
runs = KfpRuns(Cluster(host=host, experiment="e"), settings, placement=Placement(), interval=0.05)
runs.prepare()
print(render_json(scan_registry(settings, runs, Request(jobs=cap))[0]))
"""


class Cluster:
    """A server whose runs sign a decision after a moment; it kills the controller at one begin or end of a run."""

    def __init__(self, place: Path, server: KfpServer, store: str) -> None:
        key = write_key(place / "keys")
        self.uri, self.server, self.kill = f"sqlite:///{place}/mlflow.db", server, ("", "")
        self._signer = read_signer(Path(key["private_file"]).read_bytes(), "test")
        self._lock, self._controller = threading.Lock(), None
        settings = {"store": store, "tracking_uri": self.uri, "signing": {"trusted_keys": f"{place}/keys"}}
        self._command = [sys.executable, "-c", CONTROLLER, server.url, str(CAP), json.dumps(settings)]
        for number in range(1, VERSIONS + 1):
            self.register(number)
        server.play = self._play

    def register(self, number: int) -> None:
        registry.register_source(self.uri, "faces", f"s3://models/{number}", {registry.DIGEST_TAG: "unknown"})

    def scan(self) -> tuple[int, str]:
        """Let a controller scan the registry; return its exit code and what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._controller = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment)
        out, _ = self._controller.communicate(timeout=300)
        return self._controller.returncode, out

    def _play(self, source: str) -> str:
        self._strike("begin", source)
        threading.Event().wait(0.3)
        self._strike("end", source)
        if source == BROKEN:
            return "FAILED"
        name, version = source.removeprefix("models:/").split("/")
        with self._lock:
            registry.mark(self.uri, name, version, decided_tags(self._signer, source))
        return "SUCCEEDED"

    def _strike(self, moment: str, source: str) -> None:
        if self.kill == (moment, source):
            assert self._controller is not None
            self.kill = ("", "")
            self._controller.send_signal(signal.SIGKILL)
            self._controller.wait()


@pytest.fixture
def cluster(tmp_path: Path, s3_environment: S3Server) -> Iterator[Cluster]:
    with kfp_server() as server:
        yield Cluster(tmp_path, server, f"s3://{s3_environment.bucket()}/store")


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("moment", [("end", BROKEN), ("begin", "models:/faces/7"), ("end", "models:/faces/4")])
def test_a_killed_controller_loses_and_repeats_nothing_and_the_cap_holds(
    cluster: Cluster, moment: tuple[str, str]
) -> None:
    cluster.kill = moment
    code, out = cluster.scan()
    assert (code, out) == (-signal.SIGKILL, "") and 0 < len(cluster.server.runs) < VERSIONS
    cluster.register(VERSIONS + 1)  # the newest comes first, but not before what is under way
    code, out = cluster.scan()
    summary = json.loads(out)
    assert code == 0 and summary["resumed"]
    everything = [f"models:/faces/{number}" for number in range(1, VERSIONS + 2)]
    assert sorted(cluster.server.sources()) == sorted(everything), "each was submitted, once"
    assert cluster.server.most == CAP
    status = {f"models:/faces/{row['version']}": row["status"] for row in summary["versions"]}
    assert [uri for uri in everything if status[uri] == "failed"] == [BROKEN]
    assert {status[uri] for uri in everything} == {"scanned", "skipped", "failed"}
