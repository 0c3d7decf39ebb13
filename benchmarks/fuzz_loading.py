"""Fuzz the loading of models: many damaged folders, and what became of each.

    python -m benchmarks.fuzz_loading [--cases 20000] [--seed 0] [--out benchmarks/results/fuzz.json]

Every case is a tiny real pipeline of one of the families with one to three mutations. It is loaded as the stages do:
static checks, then a Denoiser. Allowed are acceptance and refusal. Anything else is a failure: another exception, a
process that dies, more than SECONDS, more memory than twice the folder plus SPARE, or the acceptance of a file that the
reference rejects or reads differently (safetensors for weights, the json module for JSON, the classes of diffusers for
configurations). Cases run in worker processes of many cases each. The run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.mutations import mutate
from diffdefend_core.errors import DiffDefendError

SECONDS = 10
WALL_SECONDS = 300
SPARE = 500 << 20
CHUNK = 2500
ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("ddpm", "ncsn", "flow", "consistency", "ldm")


class Hang(BaseException):
    """Raised in a case that takes too long; no handler of the code under test catches it."""


def run_case(base: Path, seed: int, number: int) -> dict[str, Any]:
    """Damage a copy of one of the models below `base`, load it, and return what happened as plain values."""
    draw = random.Random(f"{seed}:{number}")
    family = draw.choice(sorted(path.name for path in base.iterdir()))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(shutil.copytree(base / family, Path(scratch) / "model"))
        kinds = mutate(folder, draw)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        before = _reset_peak()
        began, worked = time.monotonic(), time.process_time()
        outcome, reason = _outcome(folder, base / family)
        facts = {"wall": time.monotonic() - began, "cpu": time.process_time() - worked}
        memory = max(0, _status("VmHWM") - before)
    if memory > 2 * size + SPARE and outcome in ("accepted", "refused"):
        outcome, reason = "memory", f"{memory} bytes for {size}"
    return {"case": number, "family": family, "kinds": kinds, "outcome": outcome, "reason": reason, "memory": memory,
            **{name: round(value, 4) for name, value in facts.items()}}  # fmt: skip


def _outcome(folder: Path, model: Path) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        return _load(folder, model)
    except Hang as error:
        return "hang", str(error)
    except Exception as error:  # what is looked for
        return "crash", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(folder: Path, model: Path) -> tuple[str, str]:
    from diffdefend_core.loading.build import load_denoiser

    try:
        load_denoiser(folder)
    except DiffDefendError as error:
        return "refused", error.found[:100]
    difference = reference_says(folder, model)
    return ("wrong", difference) if difference else ("accepted", "")


def reference_says(folder: Path, model: Path | None = None) -> str:
    """Return why other readers reject an accepted folder or read it differently; empty if they agree.

    Configurations that are those of `model`, which was compared before, are not compared again.
    """
    from safetensors import SafetensorError, safe_open

    from diffdefend_core.loading.static import inspect_folder

    found = inspect_folder(folder)
    try:
        for name, tensors in found.tensors.items():
            with safe_open(folder / name, framework="np") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if shapes != {key: info.shape for key, info in tensors.items()}:
                return f"{name} has other tensors for safetensors"
        for part in found.parts.values():
            text = (folder / part.config).read_text(encoding="utf-8")
            if model is not None and text == (model / part.config).read_text(encoding="utf-8"):
                continue
            config = json.loads(text)
            difference = _other_arguments(part.class_name, config, part.arguments)
            if difference:
                return f"{part.config}: {difference}"
    except (SafetensorError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _other_arguments(class_name: str, config: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Compare the checked arguments with those that the class of diffusers takes from the same configuration."""
    import torch

    from diffdefend_core.loading.networks import CLASSES

    with torch.device("meta"):
        theirs = CLASSES[class_name].from_config(config).config  # type: ignore[attr-defined]
    for name, value in arguments.items():
        # documented differences: an absent scaling factor is 1, and one side stands for two equal ones
        if name == "scaling_factor" and name not in config:
            continue
        other = theirs[name]
        if name == "sample_size" and isinstance(other, int):
            other = (other, other)
        if _plain(other) != _plain(value):
            return f"{name} is {value!r}, for diffusers {other!r}"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _status(name: str) -> int:
    """Return a size of this process in bytes, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {name}")


def _reset_peak() -> int:
    """Start the high-water mark of resident memory anew; return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def work(base: Path, seed: int, first: int, last: int, results: Path) -> None:
    """Run the cases from `first` to before `last`, each a line of `results`; the case that runs is noted beside it."""
    import warnings

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    current = results.with_suffix(".current")
    for family in sorted(base.iterdir()):
        if _load(family, family) != ("accepted", "") or reference_says(
            family
        ):  # also imports what loading needs, which is no part of a case
            raise RuntimeError(f"the model {family.name} is not accepted as it is")
    with results.open("a", encoding="utf-8") as file:
        for number in range(first, last):
            current.write_text(str(number), encoding="ascii")
            file.write(json.dumps(run_case(base, seed, number)) + "\n")
            file.flush()


def _interrupt(number: int, _: object) -> None:
    raise Hang(f"more than {SECONDS} s of work" if number == signal.SIGPROF else f"{WALL_SECONDS} s of waiting")


def supervise(base: Path, seed: int, cases: int, results: Path) -> None:
    """Start workers until all cases have a line; a worker that dies is a crash of the case that it ran."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSERS_VERBOSITY": "critical"}
    while (done := _lines(results)) < cases:
        last = min(cases, done + CHUNK)
        command = [
            sys.executable,
            "-m",
            "benchmarks.fuzz_loading",
            "--worker",
            str(base),
            str(seed),
            str(done),
            str(last),
        ]
        code = subprocess.run([*command, str(results)], cwd=ROOT, env=environment, check=False).returncode
        if code != 0:
            number = int(results.with_suffix(".current").read_text(encoding="ascii"))
            crash = {
                "case": number,
                "family": "",
                "kinds": [],
                "outcome": "crash",
                "reason": f"the process ended with {code}",
            }
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**crash, "memory": 0, "wall": 0.0, "cpu": 0.0}) + "\n")
        print(f"{_lines(results)} of {cases}", file=sys.stderr)


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def summary(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the figures over all cases."""
    outcomes = Counter(row["outcome"] for row in rows)
    kinds: dict[str, Counter[str]] = {}
    for row in rows:
        for kind in set(row["kinds"]):
            kinds.setdefault(kind, Counter())[row["outcome"]] += 1
    bad = [row for row in rows if row["outcome"] not in ("accepted", "refused")]
    return {
        "seed": seed,
        "cases": len(rows),
        "outcomes": dict(sorted(outcomes.items())),
        "by_mutation": {kind: dict(sorted(counter.items())) for kind, counter in sorted(kinds.items())},
        "slowest_seconds_of_work": max(row["cpu"] for row in rows),
        "slowest_seconds_on_the_clock": max(row["wall"] for row in rows),
        "most_memory_megabytes": round(max(row["memory"] for row in rows) / 1e6, 1),
        "different_refusals": len({row["reason"] for row in rows if row["outcome"] == "refused"}),
        "failures": bad[:50],
    }


def make_models(base: Path) -> None:
    """Write a tiny pipeline of every family."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_tiny_pipeline

    for family in FAMILIES:
        if not (base / family).exists():
            save_tiny_pipeline(base / family, family)


def main() -> int:
    """Run what is left of the cases and print the figures; return 1 if there is a failure among them."""
    if sys.argv[1:2] == ["--worker"]:
        base, seed, first, last, results = sys.argv[2:]
        work(Path(base), int(seed), int(first), int(last), Path(results))
        return 0
    parser = argparse.ArgumentParser(description="Fuzz the loading of models.")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuzz.json")
    parser.add_argument("--to", type=Path, default=ROOT / "runs/fuzz", help="models and results of single cases")
    options = parser.parse_args()
    results = options.to / f"cases-{options.seed}.jsonl"
    make_models(options.to / "models")
    supervise(options.to / "models", options.seed, options.cases, results)
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()][: options.cases]
    document = summary(rows, options.seed)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))
    return 1 if document["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
