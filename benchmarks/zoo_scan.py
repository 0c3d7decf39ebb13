"""Scan every model of the fixture zoo and compare verdict and trigger with the truth.

    python -m benchmarks.zoo_scan [NAME ...]

Prints a Markdown table and writes `benchmarks/results/zoo_scan.json`. Each clean model is left out of its own
calibration. With names only these are scanned, and their rows replaced.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffdefend_core.artifacts import Verdict
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection.decide import score
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import read_best
from diffdefend_core.stages.scan import scan
from zoo.build import HERE
from zoo.recipes import RECIPES, by_name

RESULTS = Path(__file__).parent / "results" / "zoo_scan.json"


def facts_of(name: str) -> dict[str, Any]:
    """Return the facts of a model's card."""
    card = (HERE / name / "README.md").read_text()
    facts: dict[str, Any] = json.loads(card.partition("```json")[2].partition("```")[0])
    return facts


def scanned(name: str, settings: Settings) -> dict[str, Any]:
    """Scan one model and return a row of the table."""
    began = time.monotonic()
    _, trigger_uri, verdict_uri = scan(str(HERE / name), settings=settings)
    seconds = time.monotonic() - began
    verdict, facts = read_record(Verdict, verdict_uri, "verdict"), facts_of(name)
    row = {
        "model": name,
        "backdoored": facts["backdoored"],
        "asr": facts["asr"][facts["sampler"]] if facts["backdoored"] else None,
        "verdict": verdict.word.value,
        "probability": verdict.probability,
        "score": score(verdict.statistics),
        "statistics": {key: item.score for key, item in verdict.statistics.items()},
        "forward_equivalents": verdict.forward_equivalents,
        "seconds": round(seconds, 1),
    }
    return row | (_trigger_error(name, read_best(trigger_uri)) if facts["backdoored"] else {})


def _trigger_error(name: str, found: Tensor) -> dict[str, float]:
    true = load_file(HERE / "backdoors" / f"{name}.safetensors")["trigger"]
    return {"cosine": cosine(found, true), "relative_l2": ((found - true).norm() / true.norm()).item()}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | planted | ASR | verdict | probability | score | cosine | relative L2 | evaluations | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        planted = "yes" if row["backdoored"] else "no"
        asr = f"{row['asr']:.2f}" if row["asr"] is not None else ""
        found = f"{row['cosine']:.2f} | {row['relative_l2']:.2f}" if row["backdoored"] else " | "
        lines.append(
            f"| {row['model']} | {planted} | {asr} | {row['verdict']} | {row['probability']:.3f} | {row['score']:.1f} "
            f"| {found} | {row['forward_equivalents']} | {row['seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Scan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models (default: all that the repository holds)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = [by_name(name).name for name in arguments.names] or [recipe.name for recipe in RECIPES if recipe.shipped]
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() and arguments.names else {"seed": None, "models": []}
    found = {row["model"]: row for row in old["models"] if old["seed"] == arguments.seed}
    with tempfile.TemporaryDirectory() as store:
        settings = load_settings(store=Path(store).as_uri(), seed=arguments.seed)
        for name in names:
            found[name] = scanned(name, settings)
    rows = [found[recipe.name] for recipe in RECIPES if recipe.name in found]
    print(table(rows))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"seed": arguments.seed, "models": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
