"""All methods of detection on the same zoo, in one run: how well they tell clean from backdoored, and what they cost.

    python -m benchmarks.detection [--methods a,b] [--models x,y] [--seeds 0,1,2] [--jobs N]
                                   [--terd-budget full|tenth] [--terd-full NAME ...] [--to FOLDER]

Every (method, model, seed) is searched and measured as a scan does, in a process of its own with one thread, so that
seconds and peak memory are its own. Finished ones are kept in `detection.jsonl`, which git ignores, and are not run
again with the same options and the same model; delete the file after a change of the code. What is named limits what
is run: the report is of everything that is finished. It goes to `benchmarks/results/detection.json`, as Markdown to
stdout, and as two figures to `docs/images`; with `--to` all files go to that folder. Models that are missing are built
first.

`terd` has a tenth of the published iterations unless told otherwise; `terd-full` are the models of `--terd-full` with
all of them. A method that has not measured every model of the report is in the comparison of costs alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peak import peak_megabytes
from benchmarks.plots import cost_figure, roc_figure
from benchmarks.scores import Row, Truth, report
from benchmarks.tables import attacks_table, methods_table, models_table
from diffdefend_core.config import PEERS, Settings, load_settings, merge_flags, parse_assignment
from diffdefend_core.errors import DiffDefendError, InputError
from diffdefend_core.inversion.refine import cosine
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.loading.static import inspect_folder
from diffdefend_core.options import TerdOptions
from diffdefend_core.progress import silent
from diffdefend_core.provenance import code_version
from diffdefend_core.stages.methods import chosen, measured, search
from zoo.build import Zoo, build, standard_zoo
from zoo.recipes import RECIPES, Recipe, by_name

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
DEFAULT, FULL = "diffdefend", "terd-full"
NAMES = (DEFAULT, *PEERS)
BUDGETS = {"full": 1, "tenth": 10}
FIRES_AT = 0.5
NOT_SHIFTS = ("gamma",)  # a candidate of TERD that is a deviation


@dataclass(frozen=True)
class Run:
    """One thing to measure: a method by its name in this benchmark, a model of the zoo, a seed."""

    method: str
    model: str
    seed: int


@dataclass(frozen=True)
class Budget:
    """What a run may spend: the divisor of TERD's iterations, and settings as `group.field=value` that win over it."""

    terd: str
    assignments: tuple[str, ...] = ()

    def settings(self, method: str, seed: int) -> Settings:
        """Return the settings of a method by its name in this benchmark. Raises InputError."""
        options, divisor = TerdOptions(), 1 if method == FULL else BUDGETS[self.terd]
        flags: dict[str, Any] = {"inversion": {"method": "terd" if method == FULL else method}}
        if divisor > 1:
            names = ("iterations", "refinement_iterations")
            flags["terd"] = {name: getattr(options, name) // divisor for name in names}
        return load_settings(**merge_flags(flags, *map(parse_assignment, self.assignments)), seed=seed, device="cpu")

    def digest(self, method: str) -> str:
        """Return the digest of the options of a method."""
        settings = self.settings(method, 0)
        return chosen(settings).digest(settings)

    def flags(self) -> list[str]:
        """Return the command line flags that stand for it."""
        return ["--terd-budget", self.terd, *(part for text in self.assignments for part in ("--set", text))]


@dataclass(frozen=True)
class Kept:
    """The finished rows: one JSON object a line, appended as soon as it is there."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """Yield the rows; a line that was cut off is none."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def append(self, row: Row) -> None:
        """Write one row at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts of the card in a model's folder."""
    card = (folder / "README.md").read_text()
    facts: dict[str, Any] = json.loads(card.partition("```json")[2].partition("```")[0])
    return facts


def truth_of(recipe: Recipe, zoo: Zoo) -> Truth:
    """Return what a built model is: whether it fires is the ASR of its card under the sampler it was made for."""
    folder = zoo.place(recipe)
    asr = None
    if recipe.attack is not None:
        facts = facts_of(folder)
        asr = facts["asr"][facts["sampler"]]
    inspection = inspect_folder(folder)
    return Truth(
        name=recipe.name,
        digest=content_digest(inspection.files),
        family=inspection.family,
        process=load_denoiser(folder).kind,
        shape=tuple(inspection.shape),
        attack=recipe.attack,
        fires=None if asr is None else asr >= FIRES_AT,
    )


def measure_one(recipe: Recipe, zoo: Zoo, settings: Settings) -> Row:
    """Return the row of one model: what search and measurement say, and what they cost.

    A search that ends with an error is a row with `error` and without statistics: the method could not tell.
    """
    truth, method = truth_of(recipe, zoo), chosen(settings)
    suspect = load_denoiser(zoo.place(recipe))
    row: Row = {
        "model": recipe.name,
        "model_digest": truth.digest,
        "seed": settings.seed,
        "options_digest": method.digest(settings),
        "options": method.recorded(settings),
        "producer": code_version(),
    }
    began = time.monotonic()
    try:
        found = search(suspect, truth.digest, settings, seed=settings.seed, progress=silent)
        measurement = measured(suspect, found.record, found.triggers, settings, seed=settings.seed + 1, progress=silent)
    except (DiffDefendError, FloatingPointError) as error:
        row |= {"error": str(error), "statistics": {}, "sampler": "", "best": "", "forward_equivalents": None}
    else:
        row |= {
            "statistics": {
                name: value if math.isfinite(value) else None for name, value in measurement.statistics.items()
            },
            "sampler": measurement.sampler,
            "best": found.record.best,
            "forward_equivalents": found.record.forward_equivalents + measurement.forward_equivalents,
        }
        if truth.attack is not None:
            row |= closeness(found.triggers, found.record.best, load_file(zoo.backdoor_file(recipe))["trigger"])
    return row | {"seconds": round(time.monotonic() - began, 2), "peak_mb": round(peak_megabytes(), 1)}


def closeness(found: Mapping[str, Tensor], best: str, true: Tensor) -> dict[str, float | None]:
    """Return cosine and relative L2 distance to the true trigger [C, H, W]: of `best`, and the best of any candidate.

    A value that is not finite is None.
    """
    shifts = {name: tau for name, tau in found.items() if name not in NOT_SHIFTS}
    cosines = {name: cosine(tau, true) for name, tau in shifts.items()}
    distances = {name: ((tau - true).norm() / true.norm()).item() for name, tau in shifts.items()}
    values = {
        "cosine": cosines[best],
        "relative_l2": distances[best],
        "cosine_of_any": max(cosines.values()),
        "relative_l2_of_any": min(distances.values()),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def pending(runs: Sequence[Run], rows: Sequence[Row], truths: Mapping[str, Truth], budget: Budget) -> list[Run]:
    """Return the runs that no kept row answers: same options, seed, and content of the model."""
    digests = {method: budget.digest(method) for method in {run.method for run in runs}}
    done = {(row["options_digest"], row["model"], row["model_digest"], row["seed"]) for row in rows}
    return [run for run in runs if (digests[run.method], run.model, truths[run.model].digest, run.seed) not in done]


def rows_by_method(rows: Sequence[Row], truths: Mapping[str, Truth], budget: Budget) -> dict[str, list[Row]]:
    """Return the rows of each method with these options and the models as they are now; the last of equal ones.

    They are in the order of the seeds, then of `truths`.
    """
    wanted = {budget.digest(method): method for method in (FULL, *NAMES)}  # without a cut both TERDs are `terd`
    found: dict[str, dict[tuple[str, int], Row]] = {method: {} for method in (*NAMES, FULL)}
    for row in rows:
        truth = truths.get(row["model"])
        if row["options_digest"] in wanted and truth is not None and truth.digest == row["model_digest"]:
            found[wanted[row["options_digest"]]][row["model"], row["seed"]] = row
    order = list(truths)
    return {
        method: [of[key] for key in sorted(of, key=lambda key: (key[1], order.index(key[0])))]
        for method, of in found.items()
        if of
    }


def in_process(run: Run, budget: Budget) -> Row:
    """Return the row that a process of its own measures. Raises CalledProcessError if it ends otherwise."""
    command = [sys.executable, "-m", "benchmarks.detection", "--one", run.method, run.model, "--seed", str(run.seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *budget.flags()], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def run_all(runs: Sequence[Run], budget: Budget, jobs: int, kept: Kept) -> int:
    """Measure all runs, `jobs` at once, keep each row when it is there, and return how many failed."""
    failed = 0
    executor = ThreadPoolExecutor(jobs)
    try:
        futures = {executor.submit(in_process, run, budget): run for run in runs}
        for number, future in enumerate(as_completed(futures)):
            run = futures[future]
            try:
                row = future.result()
                kept.append(row)
                said = f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB"
            except subprocess.CalledProcessError as error:
                failed += 1
                said = f"failed with exit code {error.returncode}"
            print(f"[{number + 1}/{len(runs)}] {run.method} {run.model} seed {run.seed}: {said}", file=sys.stderr)
    finally:
        executor.shutdown(cancel_futures=True)
    return failed


def wanted_runs(methods: Sequence[str], models: Sequence[str], full: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Return what is to be measured: every method on every model, and TERD with its full budget on some."""
    pairs = [(method, model) for method in methods for model in models] + [(FULL, model) for model in full]
    return [Run(method, model, seed) for seed in seeds for method, model in pairs]


def write(document: dict[str, Any], results: Path, images: Path) -> None:
    """Write the report and its figures, and print its tables."""
    results.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    (results / "detection.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    default = [row for row in document["models"] if row["method"] == DEFAULT]
    tables = (methods_table(document["methods"]), models_table(default), attacks_table(document["methods"]))
    print("\n\n".join(tables))
    roc_figure(document, images / "detection-roc.png")
    cost_figure(document, images / "detection-cost.png")


def compare(arguments: argparse.Namespace) -> int:
    """Build, measure and report; return the exit code."""
    budget, zoo = Budget(arguments.terd_budget, tuple(arguments.set)), standard_zoo()
    runs = wanted_runs(arguments.methods, arguments.models, arguments.terd_full, arguments.seeds)
    for run in runs:
        build(by_name(run.model), zoo)
    there = [recipe for recipe in RECIPES if (zoo.place(recipe) / "README.md").exists()]
    truths = {recipe.name: truth_of(recipe, zoo) for recipe in there}
    results = arguments.to or RESULTS
    kept = Kept(results / "detection.jsonl")
    failed = run_all(pending(runs, list(kept.rows()), truths, budget), budget, arguments.jobs, kept)
    rows = rows_by_method(list(kept.rows()), truths, budget)
    if not rows:
        print("detection: nothing was measured", file=sys.stderr)
        return 1
    limit = budget.settings(DEFAULT, 0).detection.limit
    document = report(rows, truths, arguments.seeds, limit)
    write(document, results, arguments.to or IMAGES)
    for method, row in document["methods"].items():
        if len(row["producers"]) > 1:
            print(f"detection: rows of {method} are of {len(row['producers'])} versions of the code", file=sys.stderr)
    if failed:
        print(f"detection: {failed} of {len(runs)} runs failed; run it again to measure them", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line. Raises SystemExit for a method or model that there is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=_names(NAMES), default=list(NAMES), metavar="A,B", help="default: all")
    every = [recipe.name for recipe in RECIPES]
    parser.add_argument("--models", type=_names(every), default=every, metavar="X,Y", help="default: the whole zoo")
    parser.add_argument(
        "--seeds", "--seed", type=lambda text: [int(part) for part in text.split(",")], default=[0], metavar="N,N"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--terd-budget", choices=list(BUDGETS), default="tenth")
    parser.add_argument("--terd-full", nargs="+", choices=every, default=[], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="an option of a method")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write all files there")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "MODEL"), help="measure one and print its row")
    return parser.parse_args(arguments)


def _names(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        strange = [name for name in text.split(",") if name not in known]
        if strange:
            raise argparse.ArgumentTypeError(f"no {', '.join(strange)}; expected some of {', '.join(known)}")
        return text.split(",")

    return read


def main() -> int:
    """Compare, or measure one model by one method; return the exit code."""
    arguments = parse()
    try:
        if arguments.one is None:
            return compare(arguments)
        method, model = arguments.one
        settings = Budget(arguments.terd_budget, tuple(arguments.set)).settings(method, arguments.seeds[0])
        print(json.dumps(measure_one(by_name(model), standard_zoo(), settings), allow_nan=False))
    except InputError as error:
        print(f"detection: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
