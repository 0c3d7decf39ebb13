"""Repair the flagged models of the zoo and fire the true trigger at them: by every sampler, rescaled, shifted, masked.

    python -m benchmarks.purification [--models x,y] [--methods diffdefend,elijah,fine-tuning] [--to FOLDER]

Every model goes through the stages of the gate: load, invert, detect, and purify if it is flagged; the trigger that is
fired is the planted one, which none of them sees. Some clean models are repaired as well, as after a false alarm.
`elijah` and `fine-tuning` are given real data (a tenth of the digits) and, for Elijah, the trigger that our search
found. Stage folders stay in `.diffdefend/purification`, finished rows in `purification.jsonl`, which git ignores, so
that a run goes on where it was stopped. The report goes to `benchmarks/results/purification.json` and as Markdown to
stdout. Models that are missing are built first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.detection import Kept
from diffdefend_core.artifacts import Candidate, PurifiedModel, Verdict, Word
from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.plant import fire
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import find as find_sampler
from diffdefend_core.diffusion.samplers.trojdiff import TROJDIFF_DDIM, TROJDIFF_DDPM
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation import extractor, plain_images
from diffdefend_core.evaluation.frechet import frechet_distance_of_rows, gaussian
from diffdefend_core.evaluation.kernel import kernel_distance
from diffdefend_core.progress import silent
from diffdefend_core.provenance import code_version
from diffdefend_core.purification.baselines import Schedule, elijah_removal, plain_fine_tuning
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.invert_trigger import read_triggers
from diffdefend_core.stages.model import fetch_denoiser
from diffdefend_core.stages.purify import purify
from diffdefend_core.stages.scan import read, scan
from zoo.build import Zoo, backdoor_of, build, device, planned_picture, samplers_of, standard_zoo, success
from zoo.recipes import RECIPES, Recipe, by_name
from zoo.train import clean_data

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLEAN = ("tuned-a1", "tuned-c1", "tuned-ncsn1", "tuned-ldm1", "tuned-flow1")  # repaired as after a false alarm
METHODS = ("diffdefend", "elijah", "fine-tuning")
SHARE_OF_DATA = 10  # one real row in so many
SAMPLES, FIRED, RESAMPLES = 1024, 64, 200
FIRED_BY_OWN = 128  # 0 of 128 leaves 2.9 % as the upper bound
Row = dict[str, Any]


@dataclass(frozen=True)
class Repaired:
    """A repaired model, the evaluations spent (the scan before not counted), and what its rescan says."""

    denoiser: Denoiser
    forward_equivalents: int
    rescan: str
    rounds: int


def ours(scanned: tuple[str, str, str], settings: Settings, device: str) -> Repaired:
    """Return the model of the purify stage, on a device."""
    uri = purify(*scanned, settings=settings)
    purified = read_record(Candidate, uri, "candidate").purified
    assert isinstance(purified, PurifiedModel)
    denoiser = fetch_denoiser(uri, device)
    return Repaired(denoiser, purified.forward_equivalents, purified.rescan.word.value, purified.rounds)


def baseline(method: str, suspect: Denoiser, trigger: Tensor, rows: Tensor, seed: int) -> Repaired:
    """Return the model of a baseline, trained on a tenth of the real data."""
    data = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: len(rows) // SHARE_OF_DATA]]
    quiet: Callable[[int, int], None] = lambda done, total: None  # noqa: E731
    if method == "elijah":
        denoiser, spent = elijah_removal(suspect, trigger, data, Schedule(), seed=seed, progress=quiet)
    else:
        denoiser, spent = plain_fine_tuning(suspect, data, Schedule(), seed=seed, progress=quiet)
    return Repaired(denoiser, spent, "not scanned", 1)


def false_alarm(recipe: Recipe, zoo: Zoo, settings: Settings) -> list[Row]:
    """Return the row of a clean model that the stages repair nevertheless: its verdict is turned to backdoored."""
    suspect = zoo.read(recipe).denoiser
    model_uri, trigger_uri, verdict_uri = scan(str(zoo.place(recipe)), settings=settings)
    verdict = replace(read_record(Verdict, verdict_uri, "verdict"), word=Word.BACKDOORED)
    alarm = run_once(
        "detect",
        store=settings.store,
        parents=(parent("load", model_uri), parent("invert_trigger", trigger_uri)),
        options={"alarm": "false"},
        work=lambda folder: write_record(folder, "verdict", verdict),
    )
    began = time.monotonic()
    after = ours((model_uri, trigger_uri, alarm), settings, zoo.device)
    seconds = round(time.monotonic() - began, 1)
    real = extractor(settings.evaluation.extractor).features(zoo.data.images)
    found = {
        "model": recipe.name, "family": recipe.family, "attack": None, "method": "diffdefend", "verdict": "not asked",
        "producer": code_version(), "sampler": "", "trigger": "", "forward_equivalents": after.forward_equivalents,
        "seconds": seconds, "rescan": after.rescan, "rounds": after.rounds,
    }  # fmt: skip
    return [found | distances(features(suspect, settings), features(after.denoiser, settings), real)]


def features(denoiser: Denoiser, settings: Settings) -> Tensor:
    """Return the features [N, D] of the model's plain images, by the same seeds for every model."""
    options = replace(settings.evaluation, samples=SAMPLES)
    return extractor(options.extractor).features(plain_images(denoiser, options, settings.seed + 3, silent))


def distances(before: Tensor, after: Tensor, real: Tensor) -> dict[str, Any]:
    """Return FID and KID to the real features, and their relative and absolute change with paired intervals."""
    goal = gaussian(real)
    pairs = [(frechet_distance_of_rows(before, goal), frechet_distance_of_rows(after, goal))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES):
        rows = torch.randint(len(before), (len(before),), generator=generator)
        pairs.append((frechet_distance_of_rows(before[rows], goal), frechet_distance_of_rows(after[rows], goal)))
    changes = sorted(new / old - 1 for old, new in pairs[1:])
    kid = [kernel_distance(item, real) for item in (before, after)]
    return {
        "fid_before": pairs[0][0],
        "fid_after": pairs[0][1],
        "delta_fid": pairs[0][1] / pairs[0][0] - 1,
        "delta_fid_interval": [changes[int(0.025 * RESAMPLES)], changes[int(0.975 * RESAMPLES)]],
        "delta_kid": kid[1] - kid[0],
    }


def fired(denoiser: Denoiser, recipe: Recipe, backdoor: Backdoor, sampler: str, zoo: Zoo, count: int) -> Row:
    """Return ASR and mean squared error to the target of images under a backdoor by one sampler."""
    steps = {TROJDIFF_DDPM: 1000, TROJDIFF_DDIM: 50}.get(sampler) or find_sampler(sampler).steps
    images = fire(denoiser, backdoor, count, sampler=sampler, steps=steps, seed=1)
    row: Row = {"asr": success(recipe, denoiser, images, zoo.data), "mse": None}
    if recipe.target is not None and not recipe.target.startswith(("class:", "frames")):
        row["mse"] = (
            (denoiser.pictures(images.to(denoiser.device)).cpu() - planned_picture(recipe, zoo.data))
            .square()
            .mean()
            .item()
        )
    return row


def variants(backdoor: Backdoor) -> Iterator[tuple[str, Backdoor]]:
    """Yield the true trigger rescaled, shifted by a pixel, and with its left half masked."""
    trigger = backdoor.trigger
    masked = trigger.clone()
    masked[..., : trigger.shape[-1] // 2] = 0
    changed = {
        "x 0.75": 0.75 * trigger,
        "x 1.25": 1.25 * trigger,
        "shifted": torch.roll(trigger, 1, dims=-1),
        "masked": masked,
    }
    for name, item in changed.items():
        yield name, replace(backdoor, trigger=item)


def rows_of(recipe: Recipe, method: str, zoo: Zoo, settings: Settings) -> list[Row]:
    """Return a row for each sampler that fits, and one for each variant of the trigger by the attack's own sampler."""
    if recipe.attack is None:
        return false_alarm(recipe, zoo, settings) if method == "diffdefend" else []
    suspect = zoo.read(recipe).denoiser
    scanned = scan(str(zoo.place(recipe)), settings=settings)
    _, inverted, verdict = read(*scanned)
    head: Row = {
        "model": recipe.name,
        "family": recipe.family,
        "attack": recipe.attack,
        "method": method,
        "verdict": verdict.word.value,
        "producer": code_version(),
    }
    if verdict.word is not Word.BACKDOORED:
        return [head | {"sampler": "", "trigger": ""}]
    began = time.monotonic()
    rows = clean_data(suspect, zoo.data)
    after = (
        ours(scanned, settings, zoo.device)
        if method == "diffdefend"
        else baseline(method, suspect, read_triggers(scanned[1])[inverted.best], rows, settings.seed)
    )
    head |= {"seconds": round(time.monotonic() - began, 1), "rescan": after.rescan, "rounds": after.rounds}
    head["forward_equivalents"] = after.forward_equivalents
    real = extractor(settings.evaluation.extractor).features(zoo.data.images)
    head |= distances(features(suspect, settings), features(after.denoiser, settings), real)
    backdoor = backdoor_of(recipe, suspect, zoo)
    tries = [(sampler, "true", backdoor) for sampler in samplers_of(suspect, backdoor)]
    tries += [(backdoor.sampler, name, item) for name, item in variants(backdoor)]
    found = []
    for sampler, name, item in tries:
        count = FIRED_BY_OWN if (sampler, name) == (backdoor.sampler, "true") else FIRED
        before, now = (fired(model, recipe, item, sampler, zoo, count) for model in (suspect, after.denoiser))
        found.append(
            head
            | {"sampler": sampler, "trigger": name, "own": sampler == backdoor.sampler, "n": count}
            | {
                "asr_before": before["asr"],
                "asr_after": now["asr"],
                "mse_before": before["mse"],
                "mse_after": now["mse"],
            }
        )
    return found


def summary(rows: list[Row]) -> str:
    """Return a Markdown table with one line per model and method."""
    lines = [
        "| model | attack | method | rounds | ASR before | ASR after | worst sampler | worst variant | change of FID "
        "| rescan | evaluations | seconds | code |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    for (model, method), group in groups.items():
        first = group[0]
        code = first["producer"].partition("+")[2][:7]
        if first["attack"] is None:
            low, high = first["delta_fid_interval"]
            lines.append(
                f"| {model} | none: a false alarm | {method} | {first['rounds']} |"
                + " |" * 4
                + f" {first['delta_fid']:+.1%} ({low:+.1%}, {high:+.1%}) | {first['rescan']} "
                f"| {first['forward_equivalents']} | {first['seconds']:.0f} | {code} |"
            )
            continue
        if not first["sampler"]:
            lines.append(f"| {model} | {first['attack']} | {method} | {first['verdict']}: not repaired |" + " |" * 9)
            continue
        true = [row for row in group if row["trigger"] == "true"]
        own = next(row for row in true if row["own"])
        worst = max(true, key=lambda row: row["asr_after"])
        other = max((row for row in group if row["trigger"] != "true"), key=lambda row: row["asr_after"])
        low, high = first["delta_fid_interval"]
        lines.append(
            f"| {model} | {first['attack']} | {method} | {first['rounds']} | {own['asr_before']:.3f} "
            f"| {own['asr_after']:.3f} | {worst['sampler']} {worst['asr_after']:.3f} "
            f"| {other['trigger']} {other['asr_after']:.3f} | {first['delta_fid']:+.1%} ({low:+.1%}, {high:+.1%}) "
            f"| {first['rescan']} | {first['forward_equivalents']} | {first['seconds']:.0f} | {code} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Repair, measure and report; return the exit code."""
    known = [recipe.name for recipe in RECIPES if recipe.attack or recipe.name in CLEAN]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=known, metavar="X,Y")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), metavar="A,B")
    parser.add_argument(
        "--device", type=device, default="cpu", help="where to paint, and to train the others (default: cpu)"
    )
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="FOLDER", help="write all files there")
    arguments = parser.parse_args()
    strange = [name for name in arguments.models if name not in known]
    strange += [name for name in arguments.methods if name not in METHODS]
    if strange:
        parser.error(f"no {', '.join(strange)}; models are {', '.join(known)}; methods are {', '.join(METHODS)}")
    torch.set_num_threads(1)
    zoo, kept = replace(standard_zoo(), device=arguments.device), Kept(arguments.to / "purification.jsonl")
    settings = load_settings(store=f"file://{ROOT}/.diffdefend/purification", device="cpu")
    done = {(row["model"], row["method"]) for row in kept.rows()}
    try:
        for model, method in ((model, method) for method in arguments.methods for model in arguments.models):
            if (model, method) in done:
                continue
            recipe = by_name(model)
            build(recipe, zoo)
            for row in rows_of(recipe, method, zoo, settings):
                kept.append(row)
            print(f"{model} {method} done", file=sys.stderr, flush=True)
    except InputError as error:
        print(f"purification: {error}", file=sys.stderr)
        return 2
    rows = sorted(kept.rows(), key=lambda row: (known.index(row["model"]), METHODS.index(row["method"])))
    arguments.to.mkdir(parents=True, exist_ok=True)
    (arguments.to / "purification.json").write_text(json.dumps({"rows": rows}, indent=2, allow_nan=False) + "\n")
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
