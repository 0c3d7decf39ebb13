"""The scan of a registry on a cluster: runs an hour under caps of 1 to 64.

    python -m benchmarks.cluster_scale [--seconds 58] [--rounds 2] [--caps 1,2,4] [--out FILE]

The controller is the real one: a registry of MLflow on sqlite, the journal on an S3 server (rclone), the kfp client
over HTTP, and the usual five seconds between two looks at the runs. The cluster is simulated by a server in a process
of its own that speaks KFP's REST API: a run takes `--seconds`, then signs the decision on its version.
The file keeps a list for each length of runs. A length that is no multiple of five waits for a look as others do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.registry_scale import ROOT, fill
from benchmarks.signed_versions import decided_tags
from diffdefend_core.config import Settings
from diffdefend_core.gate.signing import read_signer
from diffdefend_core.options import SigningOptions
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.registry_scan import Request, scan_registry
from pipelines.cluster import Cluster
from pipelines.kfp_runs import KfpRuns
from pipelines.placement import Placement
from tests.kfp_server import kfp_server
from tests.s3_server import ACCESS_KEY, SECRET_KEY, serving

CAPS = (1, 2, 4, 8, 16, 32, 64)


def serve(pipe: Connection, database: str, key_file: str, seconds: float) -> None:
    """Simulate the cluster until the pipe says stop; send its address, then what it saw."""
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersionTag
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    engine, lock = create_engine(database), threading.Lock()
    signer = read_signer(Path(key_file).read_bytes(), "benchmark")

    def play(source: str) -> str:
        time.sleep(seconds)
        name, version = source.removeprefix("models:/").split("/")
        with lock, Session(engine) as session:
            for key, value in decided_tags(signer, source).items():
                session.add(SqlModelVersionTag(name=name, version=int(version), key=key, value=value))
            session.commit()
        return "SUCCEEDED"

    with kfp_server() as state:
        state.play = play
        pipe.send(state.url)
        pipe.recv()
        pipe.send({"runs": len(state.runs), "versions": len(set(state.sources())), "most_at_once": state.most})


def measure(cap: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Scan a registry of `rounds * cap` versions under a cap."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place, versions = Path(folder), rounds * cap
        key, server = write_key(place / "keys"), stack.enter_context(serving(place / "s3"))
        os.environ |= {
            "DIFFDEFEND_S3_ENDPOINT": server.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1",
        }  # fmt: skip
        settings = Settings(
            store=f"s3://{server.bucket()}/store", tracking_uri=f"sqlite:///{place}/mlflow.db",
            signing=SigningOptions(trusted_keys=str(place / "keys")),
        )  # fmt: skip
        fill(settings, None, versions)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        arguments = (there, settings.tracking_uri, key["private_file"], seconds)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        runs = KfpRuns(Cluster(host=here.recv(), experiment="e"), settings, placement=Placement())
        runs.prepare()
        began, busy = time.monotonic(), time.process_time()
        summary, _ = scan_registry(settings, runs, Request(jobs=cap))
        took, busy = time.monotonic() - began, time.process_time() - busy
        here.send("stop")
        seen = here.recv()
        process.join()
    assert summary.counts()["scanned"] == versions == seen["runs"] == seen["versions"]
    return {
        "cap": cap, **seen, "seconds": round(took, 1), "runs_an_hour": round(3600 * versions / took),
        "controller_cpu_seconds": round(busy, 1),
    }  # fmt: skip


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=58.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--caps", type=lambda text: tuple(map(int, text.split(","))), default=CAPS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cluster_scale.json")
    given = parser.parse_args()
    rows = []
    for cap in given.caps:
        rows.append(measure(cap, given.rounds, given.seconds))
        print(json.dumps(rows[-1]), flush=True)
    figures = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    figures[f"runs of {given.seconds:g} s"] = rows
    given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
