"""A model with two backdoors is scanned and repaired, and both true triggers are fired at it before and after.

    python -m benchmarks.several_triggers [--to FOLDER]

Two BadDiffusion backdoors are planted together in `base-a` (1000 steps, 3 minutes). The scan searches one trigger; the
repair finds the other (`inversion/attractors.py`). The model and the stage folders stay in `.diffdefend/several` (or
`--to`), so that a run goes on where it was stopped. Prints a Markdown table and writes
`benchmarks/results/several_triggers.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from diffdefend_core.artifacts import Candidate, PurifiedModel
from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.plant import fire, poisoned_loss
from diffdefend_core.config import load_settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import find as find_sampler
from diffdefend_core.diffusion.training import fine_tune
from diffdefend_core.errors import DiffDefendError
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.provenance import code_version
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import read_best
from diffdefend_core.stages.model import fetch_denoiser
from diffdefend_core.stages.purify import purify
from diffdefend_core.stages.scan import read, scan
from zoo.build import Zoo, standard_zoo, success
from zoo.networks import save
from zoo.recipes import Recipe, by_name
from zoo.train import clean_data, mixed_precision, planned

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "several_triggers.json"
PLACE = ROOT / ".diffdefend" / "several"
STEPS, BATCH, POISON_RATE, RATE, SEED = 1000, 48, 0.4, 1e-3, 27
SAMPLERS, FIRED = ("DDPM-SCHED", "DDIM-SCHED", "DPM_SOLVER_PP_O2"), 64
PAIRS = (("stripes", "ring"), ("cross", "hat"))
Row = dict[str, Any]


def recipe(trigger: str, target: str) -> Recipe:
    """Return one of the two backdoors."""
    return Recipe(
        name="bad-a-twice", parent="base-a", seed=SEED, attack="baddiffusion", trigger=trigger, target=target,
        poison_rate=POISON_RATE,
    )  # fmt: skip


def plant_both(zoo: Zoo, folder: Path) -> None:
    """Train `base-a` on the sum of both poisoned losses and save it in `folder`, unless it is there."""
    if folder.exists():
        return
    model = zoo.read(by_name("base-a"))
    rows = clean_data(model.denoiser, zoo.data)
    losses = [
        poisoned_loss(planned(recipe(*pair), model.denoiser, zoo.data), rows, batch=BATCH, poison_rate=POISON_RATE)
        for pair in PAIRS
    ]
    with mixed_precision(model.denoiser.device):
        steps = fine_tune(
            model.denoiser,
            lambda denoiser, generator: torch.stack([loss(denoiser, generator) for loss in losses]).sum(),
            steps=STEPS,
            learning_rate=RATE,
            generator=torch.Generator().manual_seed(SEED),
            warmup=50,
            decay=True,
            ema=0.995,
        )
        for number, _ in enumerate(steps):
            print(f"\rplanting {number + 1}/{STEPS}", end="", file=sys.stderr)
    print(file=sys.stderr)
    folder.mkdir(parents=True)
    save(by_name("base-a"), model, folder)


def rate(denoiser: Denoiser, pair: tuple[str, str], backdoor: Backdoor, sampler: str, zoo: Zoo) -> float:
    """Return the attack success rate of one backdoor by one sampler."""
    images = fire(denoiser, backdoor, FIRED, sampler=sampler, steps=find_sampler(sampler).steps, seed=1)
    return success(recipe(*pair), denoiser, images, zoo.data)


def measured(zoo: Zoo, place: Path) -> Row:
    """Return what the scan and the repair say, and a row for each trigger and sampler."""
    settings = load_settings(store=f"file://{place}/store", device="cpu")
    scanned = scan(str(place / "model"), settings=settings)
    _, inverted, verdict = read(*scanned)
    uri = purify(*scanned, settings=settings)
    purified = read_record(Candidate, uri, "candidate").purified
    assert isinstance(purified, PurifiedModel)
    before, after = fetch_denoiser(scanned[0], "cpu"), fetch_denoiser(uri, "cpu")
    rows = []
    for pair in PAIRS:
        backdoor = planned(recipe(*pair), before, zoo.data)
        near = cosine(read_best(scanned[1]), backdoor.trigger)
        for sampler in SAMPLERS:
            rates = [rate(model, pair, backdoor, sampler, zoo) for model in (before, after)]
            rows.append(
                {"trigger": pair[0], "cosine_of_scan": near, "sampler": sampler, "n": FIRED}
                | {"asr_before": rates[0], "asr_after": rates[1]}
            )
    return {
        "verdict": verdict.word.value,
        "best": inverted.best,
        "further_triggers": purified.further_triggers,
        "rounds": purified.rounds,
        "rescan": purified.rescan.word.value,
        "forward_equivalents": purified.forward_equivalents,
        "producer": code_version(),
        "rows": rows,
    }


def main() -> int:
    """Plant, scan, repair and fire; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=PLACE, metavar="FOLDER", help="where model and stages lie")
    place = parser.parse_args().to.absolute()
    torch.set_num_threads(1)
    zoo = standard_zoo()
    try:
        plant_both(zoo, place / "model")
        found = measured(zoo, place)
    except DiffDefendError as error:
        print(f"several_triggers: {error}", file=sys.stderr)
        return 2
    print("| trigger | cosine of the scan's | sampler | ASR before | ASR after |\n|---|---|---|---|---|")
    for row in found["rows"]:
        print(
            f"| {row['trigger']} | {row['cosine_of_scan']:.2f} | {row['sampler']} "
            f"| {row['asr_before']:.3f} | {row['asr_after']:.3f} |"
        )
    print({name: value for name, value in found.items() if name != "rows"})
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
