"""A registry of thousands: how long a scan takes when nothing changed.

    python -m benchmarks.registry_scale [--versions 10000] [--out FILE]

The registry is a real MLflow on sqlite whose rows are written through MLflow's own tables, each with a decision that is
really signed.
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
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.registry_scan import Request, scan_registry
from pipelines.local_runs import LocalRuns

ROOT = Path(__file__).resolve().parent.parent


def fill(settings: Settings, signer: object, versions: int) -> None:
    """Write `versions` versions, 20 to a model, with signed decisions; without a signer they have none."""
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
            tags = decided_tags(signer, f"models:/{name}/{version}", policy=policy) if signer else {}
            for key, value in tags.items():
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
        began = time.monotonic()
        summary, _ = scan_registry(settings, LocalRuns(settings), Request())
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert summary.counts()["skipped"] == versions
    return {"versions": versions, "seconds": round(seconds, 1), "peak_mb_with_the_filling": round(peak)}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/registry_scale.json")
    given = parser.parse_args()
    figures = {"unchanged": unchanged(given.versions)}
    given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
