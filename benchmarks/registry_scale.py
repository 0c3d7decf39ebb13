"""A registry of thousands: how long a scan takes when nothing changed, and how runs go under the cap.

    python -m benchmarks.registry_scale [--versions 10000] [--out FILE]

The registry is a real MLflow on sqlite whose rows are written through MLflow's own tables, each with a decision that is
really signed. The cluster is simulated: runs of a fixed length, so that the throughput under each cap is that of the
controller.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.signed_versions import decided_tags
from diffdefend_core.config import Settings
from diffdefend_core.gate.policy import shipped_policy
from diffdefend_core.gate.signing import read_signer
from diffdefend_core.io import tracking
from diffdefend_core.options import SigningOptions
from diffdefend_core.stages.dispatch import Dispatcher, Job
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.registry_scan import Request, _ends, scan_registry

ROOT = Path(__file__).resolve().parent.parent
CAPS = (1, 4, 16, 64)
RUN_SECONDS = 1.0


class Simulated:
    """A cluster whose runs take a fixed time; it remembers the most that were under way at once."""

    kind, lasting, interval = "simulated", False, 0.005

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}
        self.begun = self.most = 0

    def begin(self, job: Job) -> str:
        """Start a run."""
        self.ends[job.uri] = time.monotonic() + RUN_SECONDS
        self.begun, self.most = self.begun + 1, max(self.most, len(self.ends))
        return job.uri

    def outcome(self, run: str) -> str | None:
        """Return None until the run's time is over."""
        if time.monotonic() < self.ends[run]:
            return None
        del self.ends[run]
        return ""

    def stop(self, run: str) -> None:
        """Forget the run."""
        del self.ends[run]


def fill(settings: Settings, signer: object, versions: int) -> None:
    """Write `versions` versions, 20 to a model, with signed decisions."""
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlModelVersionTag, SqlRegisteredModel

    tracking.connect(settings.tracking_uri).search_registered_models(max_results=1)
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    policy = shipped_policy().digest()
    with Session(create_engine(settings.tracking_uri)) as session:
        for number in range(versions):
            name, version = f"model-{number // 20:05}", number % 20 + 1
            if version == 1:
                session.add(SqlRegisteredModel(name=name, creation_time=1))
            session.add(SqlModelVersion(
                name=name, version=version, creation_time=number, last_updated_time=number, current_stage="None",
                source=f"s3://models/{name}/{version}", status="READY",
            ))  # fmt: skip
            for key, value in decided_tags(signer, f"models:/{name}/{version}", policy=policy).items():
                session.add(SqlModelVersionTag(name=name, version=version, key=key, value=value))
        session.commit()


def unchanged(versions: int) -> dict[str, Any]:
    """Return time and memory of a scan in which every decision stands."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        key = write_key(place / "keys")
        settings = Settings(
            store=f"file://{place}/store", tracking_uri=f"sqlite:///{place}/mlflow.db",
            signing=SigningOptions(trusted_keys=str(place / "keys")),
        )  # fmt: skip
        fill(settings, read_signer(Path(key["private_file"]).read_bytes(), "benchmark"), versions)
        runner, began = Simulated(), time.monotonic()
        summary, _ = scan_registry(settings, runner, Request())
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert summary.counts()["skipped"] == versions and runner.begun == 0
    return {"versions": versions, "seconds": round(seconds, 1), "peak_mb_with_the_filling": round(peak)}


def throughput(cap: int) -> dict[str, Any]:
    """Return runs per second under a cap, over four rounds."""
    runner, jobs = Simulated(), [Job(name="m", version=str(number)) for number in range(1, 4 * cap + 1)]
    began = time.monotonic()
    ended = list(_ends(Dispatcher(runner, cap=cap, limit=60.0), iter(jobs), runner.interval))
    seconds = time.monotonic() - began
    assert len(ended) == len(jobs) == runner.begun and runner.most == cap
    return {
        "cap": cap,
        "runs": len(jobs),
        "most_at_once": runner.most,
        "runs_per_second": round(len(jobs) / seconds, 2),
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/registry_scale.json")
    given = parser.parse_args()
    figures = {
        "run_seconds": RUN_SECONDS,
        "throughput": [throughput(cap) for cap in CAPS],
        "unchanged": unchanged(given.versions),
    }
    given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
