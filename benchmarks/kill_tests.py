"""Kill the stages at random moments, run them again, and compare what is left with an undisturbed run.

A trial is one scan of a tiny model through all stages. A process runs it and is killed by SIGKILL at a random moment;
the next one goes on with the same store and registry and is killed again, and the last one is left alone. A kill
falls into a stage drawn at random, so that short ones are hit as often as long ones, at a moment uniform over the
time that the stage takes undisturbed. After every kill it is checked that nothing is half-registered and that every
folder with a manifest is whole; at the end that all folders are byte-equal to those of an undisturbed run at the same
place. The decision and its report name the MLflow run, which is drawn anew: that id is left out.

    python -m benchmarks.kill_tests --kills 200

Trials are numbered and seeded; a stopped command goes on where it was (`--anew` starts again). It prints a table and
writes benchmarks/results/kill_tests.json. The exit code is 1 if anything was lost or left half-done.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdefend_core.io.directory import UNFINISHED

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results" / "kill_tests.json"
KILLS_OF_A_TRIAL = 8
# `repaired` ends as challenger, `backdoored` stays so after two rounds and loses its alias
CASES = ("repaired", "backdoored", "clean", "repaired", "backdoored", "inconclusive")
STAGES = ("load", "invert_trigger", "detect", "keep", "purify", "quarantine", "evaluate", "register")


@dataclass(frozen=True)
class Bench:
    """A tiny model, a registry that holds it as champion, and settings that lead to each verdict."""

    root: Path
    flags: dict[str, dict[str, Any]]

    @property
    def place(self) -> Path:
        """Where every run works: one path, because manifests name the URIs of their parents."""
        return self.root / "place"

    def reset(self) -> None:
        """Bring an empty store, and the registry as it was before."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.root / "before", self.place)


@dataclass
class Tally:
    """What happened: kills by the stage that they hit, trials, and everything that was not as promised."""

    trials: int = 0
    kills: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prepare(root: Path) -> Bench:
    """Make model, calibrations and registry in `root`, in a process of its own: a fork must find no threads."""
    import_all()
    tempfile.tempdir = str(root / "tmp")  # what a killed process leaves there goes with it
    (root / "tmp").mkdir(parents=True)
    if in_process(functools.partial(_prepare, root)) != 0:
        raise RuntimeError("the preparation failed")
    return Bench(root, json.loads((root / "flags.json").read_text()))


def import_all() -> None:
    """Import what the stages import, once for all forks."""
    for name in (
        "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store", "tests.tiny_models",
        "tests.tiny_scan", *(f"diffdefend_core.stages.{stage}" for stage in STAGES), "diffdefend_core.report.html",
    ):  # fmt: skip
        importlib.import_module(name)
    import torch

    from diffdefend_core.provenance import code_version

    code_version()  # kept, so that a source that is edited meanwhile changes no address
    torch.set_num_threads(1)


def _prepare(root: Path) -> None:
    from diffdefend_core.io import registry
    from tests.tiny_models import save_tiny_pipeline
    from tests.tiny_scan import calibration_for, repairing_flags, tiny_settings

    save_tiny_pipeline(root / "tiny")
    calibrations = {word: calibration_for(root / word, word) for word in ("clean", "inconclusive", "backdoored")}
    flags: dict[str, dict[str, Any]] = {word: {"calibration": uri} for word, uri in calibrations.items()}
    flags["backdoored"]["purification"] = {"rounds": 2, "checkpoint_steps": 1}
    flags["repaired"] = repairing_flags(root / "repairing", root / "tiny")
    flags["repaired"]["purification"]["checkpoint_steps"] = 1
    (root / "flags.json").write_text(json.dumps(flags))
    uri = tiny_settings(root / "before", **flags["clean"]).tracking_uri
    registry.register_source(uri, "tiny", (root / "tiny").as_uri(), {registry.DIGEST_TAG: "none"})
    registry.move_alias(uri, "tiny", "champion", "1")
    (root / "before" / "store").mkdir()


def run_stages(bench: Bench, case: str) -> None:
    """Run all stages on the registered model, as the pipeline would."""
    from diffdefend_core.artifacts import Verdict
    from diffdefend_core.stages.detect import detect
    from diffdefend_core.stages.evaluate import evaluate
    from diffdefend_core.stages.folder import read_record
    from diffdefend_core.stages.invert_trigger import invert_trigger
    from diffdefend_core.stages.keep import keep
    from diffdefend_core.stages.load import load
    from diffdefend_core.stages.purify import purify
    from diffdefend_core.stages.quarantine import quarantine
    from diffdefend_core.stages.register import register
    from tests.tiny_scan import tiny_settings

    settings = tiny_settings(bench.place, **bench.flags[case])
    scanned: list[str] = []
    with _noted(bench, "load"):
        scanned.append(load("models:/tiny/1", settings=settings))
    for stage in (invert_trigger, detect):
        with _noted(bench, stage.__name__):
            scanned.append(stage(*scanned, settings=settings))
    branch = {"clean": keep, "backdoored": purify}.get(
        read_record(Verdict, scanned[-1], "verdict").word.value, quarantine
    )
    with _noted(bench, branch.__name__):
        candidate = branch(*scanned, settings=settings)
    with _noted(bench, "evaluate"):
        card = evaluate(candidate, settings=settings)
    with _noted(bench, "register"):
        register(candidate, card, settings=settings)


@contextlib.contextmanager
def _noted(bench: Bench, stage: str) -> Iterator[None]:
    """Leave a note of the stage that begins, and of its end."""
    with (bench.root / "stages").open("a") as notes:
        print(stage, time.monotonic(), file=notes, flush=True)
        yield
        print("", time.monotonic(), file=notes, flush=True)


def noted(bench: Bench) -> list[tuple[str, float]]:
    """Return the notes of this run: the stage that began, empty for the end of one, and when (s)."""
    path = bench.root / "stages"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(stage, float(moment)) for stage, _, moment in (line.partition(" ") for line in lines)]


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after a stage began, or when it has ended before that."""

    bench: Bench
    stage: str
    after: float

    def __call__(self) -> bool:
        """Return whether it has come."""
        notes = noted(self.bench)
        number = next((number for number, (stage, _) in enumerate(notes) if stage == self.stage), None)
        if number is None:
            return False
        return len(notes) > number + 1 or time.monotonic() >= notes[number][1] + self.after


def in_process(work: Callable[[], None], moment: Callable[[], bool] | None = None) -> int:
    """Do the work in a forked process, killed when `moment` says so; return its exit code, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"the run failed: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if moment is not None and moment():
            os.kill(child, signal.SIGKILL)
            moment = None
        time.sleep(0.001)


def contents(bench: Bench) -> dict[str, str]:
    """Return the sha256 of every file of the finished folders, with the id of the MLflow run blotted out.

    What a killed writer leaves under its temporary name is no file of a folder: the store does not list it.
    """
    found = {}
    for manifest in sorted((bench.place / "store").rglob("manifest.json")):
        for path in sorted(manifest.parent.rglob("*")):
            if path.is_file() and not UNFINISHED.fullmatch(path.name):
                name = path.relative_to(bench.place / "store").as_posix()
                found[_anonymous(name)] = _digest(path)
    return found


def _anonymous(name: str) -> str:
    """The folder of a decision is named by what it says, the run's id included: take the stage for its name."""
    stage, _, rest = name.partition("/")
    return f"{stage}/{rest.partition('/')[2]}" if stage == "register" else name


def _digest(path: Path) -> str:
    text = path.read_bytes()
    if path.name in ("gate_decision.json", "report.html"):
        text = re.sub(rb"\b[0-9a-f]{32}\b", b"run", text)
    if path.name == "manifest.json" and "register" in path.parts:
        return "names the run"
    return hashlib.sha256(text).hexdigest()


def registered(bench: Bench) -> dict[str, Any]:
    """Return what the registry says, read past DiffDefend and MLflow: versions with their tags, and the aliases."""
    with contextlib.closing(sqlite3.connect(bench.place / "mlflow.db")) as database:
        aliases = database.execute("SELECT alias, version FROM registered_model_aliases WHERE name = 'tiny'").fetchall()
        versions = database.execute(
            "SELECT version FROM model_versions WHERE name = 'tiny' AND current_stage != 'Deleted_Internal'"
        ).fetchall()
        tags = database.execute("SELECT version, key, value FROM model_version_tags WHERE name = 'tiny'").fetchall()
    held: dict[str, dict[str, str]] = {str(number): {} for (number,) in versions}
    for number, key, value in tags:
        if str(number) in held:
            held[str(number)][key] = value
    plain = {number: _plain_tags(found) for number, found in held.items()}
    return {"aliases": {alias: str(number) for alias, number in aliases}, "versions": plain}


def _plain_tags(tags: dict[str, str]) -> dict[str, str]:
    """Return the tags without what names the run: its id, and the report in the folder that it named."""
    return {name: "set" if name in ("diffdefend.run_id", "diffdefend.report") else text for name, text in tags.items()}


def half_done(bench: Bench) -> list[str]:
    """Return what breaks a promise right now, after a kill."""
    from diffdefend_core.errors import DiffDefendError
    from diffdefend_core.io import folders

    wrong = []
    for manifest in (bench.place / "store").rglob("manifest.json"):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folders.fetch(manifest.parent.as_uri(), Path(scratch) / "into")
            except DiffDefendError as error:
                wrong.append(f"a finished folder is not whole: {error}")
    state = registered(bench)
    for alias, number in state["aliases"].items():
        tags = state["versions"][number]
        if number != "1" and not {"diffdefend.outcome", "diffdefend.policy_digest"} <= tags.keys():
            wrong.append(f"@{alias} points at version {number}, which has no verdict")
        if tags.get("diffdefend.outcome") == "quarantined":
            wrong.append(f"@{alias} points at version {number}, which is quarantined")
    digests = Counter(tags.get("diffdefend.model_digest") for tags in state["versions"].values())
    wrong += [f"{count} versions of the digest {digest}" for digest, count in digests.items() if count > 1]
    return wrong


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed: its files, its registry, and how long each stage took (s), in order."""

    files: dict[str, str]
    registry: dict[str, Any]
    seconds: dict[str, float]


def undisturbed(bench: Bench, case: str) -> Undisturbed:
    """Run a case once without a kill. Raises RuntimeError if it fails."""
    bench.reset()
    if run_once(bench, case) != 0:
        raise RuntimeError(f"the undisturbed run of {case} failed")
    notes = noted(bench)
    seconds = {stage: end - began for (stage, began), (_, end) in zip(notes[::2], notes[1::2], strict=True)}
    return Undisturbed(contents(bench), registered(bench), seconds)


def run_once(bench: Bench, case: str, moment: Callable[[], bool] | None = None) -> int:
    """Run all stages in a process of its own, as `in_process`, with fresh notes."""
    (bench.root / "stages").unlink(missing_ok=True)
    return in_process(functools.partial(run_stages, bench, case), moment)


def trial(bench: Bench, case: str, expected: Undisturbed, kills: int, draws: random.Random, tally: Tally) -> None:
    """Kill one scan `kills` times at random moments, let it end, and compare."""
    bench.reset()
    stages = list(expected.seconds)
    for stage in sorted((draws.choice(stages) for _ in range(kills)), key=stages.index):
        code = run_once(bench, case, Moment(bench, stage, draws.uniform(0, expected.seconds[stage])))
        if code == -signal.SIGKILL:
            tally.kills += 1
            tally.hit[stage] += 1
            tally.wrong += [f"{case}: {text}" for text in half_done(bench)]
        elif code == 0:
            break
        else:
            tally.wrong.append(f"{case}: a run after a kill ended with code {code}")
    if run_once(bench, case) != 0:
        tally.wrong.append(f"{case}: the last run failed")
    files, state = contents(bench), registered(bench)
    differing = sorted(name for name in {*files, *expected.files} if files.get(name) != expected.files.get(name))
    tally.wrong += [f"{case}: {name} differs from the undisturbed run" for name in differing]
    if state != expected.registry:
        tally.wrong.append(f"{case}: the registry holds {state}, not {expected.registry}")
    tally.trials += 1


def table(tally: Tally) -> str:
    """Return the tally as Markdown."""
    rows = [f"| {stage} | {tally.hit[stage]} |" for stage in STAGES if tally.hit[stage]]
    return "\n".join(
        ["| stage that was killed | kills |", "|---|---|", *rows, f"| all, in {tally.trials} scans | {tally.kills} |",
         "", f"not recovered, half-registered or different: {len(tally.wrong)}", *tally.wrong]
    )  # fmt: skip


def _read(path: Path) -> Tally:
    if not path.is_file():
        return Tally()
    kept = json.loads(path.read_text())
    return Tally(kept["trials"], kept["kills"], Counter(kept["hit"]), kept["wrong"], kept["seconds"])


def _write(path: Path, tally: Tally) -> None:
    path.parent.mkdir(exist_ok=True)
    fields = {**vars(tally), "hit": dict(sorted(tally.hit.items())), "seconds": round(tally.seconds)}
    path.write_text(json.dumps(fields, indent=2) + "\n")


def main() -> int:
    """Run trials until there are enough kills; return 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anew", action="store_true", help="forget what an earlier command measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    tally = Tally() if given.anew else _read(given.output)
    with tempfile.TemporaryDirectory(prefix="diffdefend-kills-") as root:
        bench = prepare(Path(root))
        expected: dict[str, Undisturbed] = {}
        while tally.kills < given.kills:
            case, began = CASES[tally.trials % len(CASES)], time.monotonic()
            if case not in expected:
                expected[case] = undisturbed(bench, case)
            kills = min(KILLS_OF_A_TRIAL, given.kills - tally.kills)
            trial(bench, case, expected[case], kills, random.Random(f"{given.seed}/{tally.trials}"), tally)
            tally.seconds += time.monotonic() - began
            _write(given.output, tally)
            print(f"{tally.kills} kills in {tally.trials} scans, {len(tally.wrong)} wrong", file=sys.stderr)
    print(table(tally))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
