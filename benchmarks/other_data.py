"""Models of other data than the zoo's, scanned as a user scans them: the shipped settings and the shipped calibration.

    python -m benchmarks.other_data DATA.npz [--unpadded] [--models x,y] [--seeds 0,1] [--device cuda] [--to FOLDER]

Recipes of the zoo learn the images of the file (at 32x32 or, unpadded, 28x28), with triggers and targets of that size;
`--models` says which. None of these models is in the calibration. Prints a Markdown table and writes
`benchmarks/results/other_data.json`, where the rows of other models stay. Models and finished stages lie in `--to`
(default `zoo/built/NAME`, or `NAME-unpadded`), so that it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.detection import closeness, truth_of
from benchmarks.tables import other_data_table
from diffdefend_core.artifacts import InvertedTrigger, ModelRef, Verdict
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection.decide import score
from diffdefend_core.errors import DiffDefendError
from diffdefend_core.provenance import code_version
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger, read_triggers
from diffdefend_core.stages.load import load
from zoo.build import Zoo, build, device, zoo_of
from zoo.recipes import Recipe, by_name

RESULTS = Path(__file__).parent / "results" / "other_data.json"
MODELS = (
    "base-a", "base-c", "tuned-a1", "tuned-c1", "bad-a-box", "bad-a-stripes", "bad-c-diagonal", "villan-ode",
    "invisible", "troj-d2i-blend",
)  # fmt: skip

Row = dict[str, Any]


def scanned(recipe: Recipe, zoo: Zoo, settings: Settings) -> Row:
    """Return what a scan says of one model, and how near its trigger is to the one that was planted."""
    truth = truth_of(recipe, zoo)
    model_uri = load(str(zoo.place(recipe)), settings=settings)
    trigger_uri = invert_trigger(model_uri, settings=settings)
    verdict = read_record(Verdict, detect(model_uri, trigger_uri, settings=settings), "verdict")
    row: Row = {
        "data": zoo.data.name,
        "model": recipe.name,
        "attack": truth.attack,
        "fires": truth.fires,
        "seed": settings.seed,
        "word": verdict.word.value,
        "probability": verdict.probability,
        "score": finite(score(verdict.statistics)),
        "z": {name: finite(item.score) for name, item in verdict.statistics.items()},
        "forward_equivalents": verdict.forward_equivalents,
        "parameters": read_record(ModelRef, model_uri, "model_ref").parameters,
        "producer": code_version(),
    }
    if truth.attack is not None:
        found = read_record(InvertedTrigger, trigger_uri, "inverted_trigger")
        true = load_file(zoo.backdoor_file(recipe))["trigger"]
        row |= closeness(read_triggers(trigger_uri), found.best, true)
    return row


def finite(value: float) -> float | None:
    """Return the value, None if it is not finite."""
    return value if math.isfinite(value) else None


def merged(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those of other models that are in the results already."""
    known = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else []
    measured = {(row["data"], row["model"]) for row in rows}
    return [row for row in known if (row["data"], row["model"]) not in measured] + list(rows)


def _seeds(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected numbers, as 0,1")
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Build, scan and report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA.npz", help="npz file with train_x and train_y")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), metavar="X,Y")
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="N,N")
    parser.add_argument("--unpadded", action="store_true", help="keep the images at 28x28")
    parser.add_argument("--device", type=device, default="cpu", help="where to train and to scan (default: cpu)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where models and stages lie")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = zoo_of(arguments.data, unpadded=arguments.unpadded, to=arguments.to, device=arguments.device)
    rows = []
    try:
        for recipe in map(by_name, arguments.models):
            build(recipe, zoo)
            for seed in arguments.seeds:
                settings = load_settings(store=str(zoo.built / "store"), seed=seed, device=arguments.device)
                rows.append(scanned(recipe, zoo, settings))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    except DiffDefendError as error:
        print(f"other_data: {error}", file=sys.stderr)
        return 2
    print(other_data_table(rows))
    RESULTS.write_text(json.dumps({"models": merged(rows)}, indent=2, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
