"""A corpus of hostile models, made anew on each run, and what loading makes of each.

    python -m benchmarks.hostile [--out benchmarks/results/hostile.json]

The kinds are in `hostile_models.py`. Every payload would write the canary, a file, if anything ran it; that payloads
work is shown first, by running one as a victim would. Each model is looked at (`inspect`), loaded by default, and
loaded with pickles allowed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hostile_models import CANARY, HARMLESS, KINDS, Payload
from diffdefend_core.errors import DiffDefendError

ROOT = Path(__file__).resolve().parent.parent


def payload_works(canary: Path) -> bool:
    """Return whether a victim that unpickles would have run the payload: the control of the whole corpus."""
    text = base64.b64encode(pickle.dumps(Payload())).decode()
    subprocess.run(
        [sys.executable, "-c", f"import base64, pickle; pickle.loads(base64.b64decode('{text}'))"], check=True
    )
    ran = canary.exists()
    canary.unlink(missing_ok=True)
    return ran


def run_kind(name: str, model: Path, scratch: Path) -> dict[str, Any]:
    """Make one hostile model from a copy of `model` and return what inspection and the two ways of loading say."""
    expected, attack = KINDS[name]
    place = Path(tempfile.mkdtemp(dir=scratch))
    folder = Path(shutil.copytree(model, place / "model"))
    attack(folder)
    folder = next(place.iterdir())
    try:
        told = {way: _told(way, folder, place / "store") for way in ("inspect", "load", "load with pickles allowed")}
    finally:
        shutil.rmtree(place)
    return {"kind": name, "expected": expected, **told, "executed": Path(os.environ[CANARY]).exists()}


def _told(way: str, folder: Path, store: Path) -> str:
    """Return `harmless`, or why it was refused. Anything but a refusal of ours is raised."""
    from diffdefend_core.config import Settings
    from diffdefend_core.loading.build import load_denoiser
    from diffdefend_core.stages.inspect_model import inspect_model
    from diffdefend_core.stages.load import load

    settings = Settings(store=f"file://{store}", allow_pickles=way.endswith("allowed"))
    try:
        if way == "inspect":
            return inspect_model(str(folder), settings=settings)["refusal"] or HARMLESS
        uri = load(str(folder), settings=settings)
        load_denoiser(Path(uri.removeprefix("file://")) / "model")
    except DiffDefendError as error:
        return str(error)
    return HARMLESS


def passed(row: dict[str, Any]) -> bool:
    """Return whether a hostile model was treated as it must be: both ways of loading agree and nothing ran."""
    ways = (row["load"], row["load with pickles allowed"])
    return not row["executed"] and all((told == HARMLESS) is (row["expected"] == HARMLESS) for told in ways)


def main() -> int:
    """Run the corpus and print its table; return 1 if any attack got through."""
    parser = argparse.ArgumentParser(description="Load a corpus of hostile models.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hostile.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_tiny_pipeline

    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        os.environ[CANARY] = f"{scratch}/canary"
        save_tiny_pipeline(Path(scratch) / "tiny")
        works = payload_works(Path(os.environ[CANARY]))
        rows = [run_kind(name, Path(scratch) / "tiny", Path(scratch)) for name in KINDS]
    for row in rows:
        mark = "ok " if passed(row) else "BAD"
        print(f"{mark} {row['kind']}: {row['load'].partition(';')[0][:120]}")
    good = sum(passed(row) for row in rows)
    print(f"{good} of {len(rows)} as they must be; the payload works where it is run: {works}")
    options.out.write_text(json.dumps({"payload_works": works, "kinds": rows}, indent=2) + "\n", encoding="utf-8")
    return 0 if works and good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
