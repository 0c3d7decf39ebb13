"""Fire every planted model of the zoo with every sampler that fits, and its clean parent with its own sampler.

    python -m benchmarks.asr_table [NAME ...]

Prints Markdown tables and writes `benchmarks/results/asr_table.json`. Models that are missing are built first. With
names only these are measured, and their rows replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from diffdefend_core.diffusion.samplers import SAMPLERS
from diffdefend_core.diffusion.samplers.trojdiff import NAMES
from zoo.build import ASR_SAMPLES, ASR_THRESHOLD, Zoo, backdoor_of, build, measured_asr, samplers_of, standard_zoo
from zoo.recipes import RECIPES, Recipe, by_name

RESULTS = Path(__file__).parent / "results" / "asr_table.json"
PUBLISHED = list(SAMPLERS)[:13]
OTHERS = [*list(SAMPLERS)[13:], *NAMES]


def measured(recipe: Recipe, zoo: Zoo) -> dict[str, Any]:
    """Return one row: the ASR by sampler, and that of the clean parent under the sampler the attack was made for."""
    denoiser, parent = zoo.read(recipe).denoiser, zoo.read(by_name(str(recipe.parent))).denoiser
    backdoor = backdoor_of(recipe, denoiser, zoo)
    rates = {name: measured_asr(denoiser, recipe, backdoor, name, zoo.data) for name in samplers_of(denoiser, backdoor)}
    row = {
        "model": recipe.name,
        "attack": recipe.attack,
        "family": recipe.family,
        "sampler": backdoor.sampler,
        "asr": rates,
        "clean_parent": measured_asr(parent, recipe, backdoor, backdoor.sampler, zoo.data),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Return the rows as Markdown with one column per sampler; the sampler an attack was made for is in bold."""
    lines = [f"| model | attack | {' | '.join(columns)} | clean parent |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [_cell(row, column) for column in columns]
        if any(cells):
            lines.append(f"| {row['model']} | {row['attack']} | {' | '.join(cells)} | {row['clean_parent']:.2f} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], sampler: str) -> str:
    if sampler not in row["asr"]:
        return ""
    text = f"{row['asr'][sampler]:.2f}"
    return f"**{text}**" if sampler == row["sampler"] else text


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models (default: all that are planted)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = standard_zoo()
    chosen = [by_name(name) for name in arguments.names] or [recipe for recipe in RECIPES if recipe.attack]
    known = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() and arguments.names else []
    found = {row["model"]: row for row in known}
    for recipe in chosen:
        build(recipe, zoo)
        found[recipe.name] = measured(recipe, zoo)
    rows = [found[recipe.name] for recipe in RECIPES if recipe.name in found]
    print(table(rows, PUBLISHED), table(rows, OTHERS), sep="\n\n")
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"samples": ASR_SAMPLES, "threshold": ASR_THRESHOLD, "models": rows}
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
