"""The demo: two real models, one clean and one backdoored, through the compiled gate with an embedded registry.

    python -m pipelines.demo [--to FOLDER]

Everything it leaves lies in one folder (runs/demo): the store, the MLflow registry, the reports and `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Scorecard, Verdict
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import DiffDefendError, InputError
from diffdefend_core.io import folders, registry
from diffdefend_core.stages.folder import read_record

ZOO = Path(__file__).resolve().parent.parent / "zoo" / "digits"


@dataclass(frozen=True)
class Entry:
    """A model of the demo: its folder in the zoo and its name in the registry."""

    folder: str
    name: str

    @property
    def backdoor(self) -> Path:
        """The file with the planted trigger and its target; it is there for a backdoored model only."""
        return ZOO / "backdoors" / f"{self.folder}.safetensors"


ENTRIES = (Entry("tuned-a1", "digits-clean"), Entry("bad-a-stripes", "digits-backdoored"))


def settings_for(entry: Entry, folder: Path) -> Settings:
    """Return the settings of one run: the real digits as FID reference and, where one was planted, the true trigger.

    Both serve the evaluation only: the scan and the repair know neither.
    """
    evaluation = {"reference": (ZOO / "reference.npz").as_uri()}
    if entry.backdoor.exists():
        evaluation["known_trigger"] = entry.backdoor.as_uri()
    return load_settings(
        store=(folder / "store").as_uri(), tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", evaluation=evaluation
    )


def put_into_registry(entry: Entry, settings: Settings) -> str:
    """Register the model by reference, as a team would; return its `models:/` URI."""
    model = ZOO / entry.folder
    digest = folders.content_digest(folders.digest_files(model))
    tags = {registry.DIGEST_TAG: digest}
    version = registry.register_source(settings.tracking_uri, entry.name, model.as_uri(), tags)
    return f"models:/{entry.name}/{version}"


class NamedLines:
    """Writes whole lines to a stream, each after the name of the model that it is about."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name, self._stream = name, stream

    def write(self, text: str) -> int:
        """Write a text of whole lines."""
        self._stream.write("".join(f"{self._name}: {line}\n" for line in text.splitlines() if line.strip()))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def run_one(entry: Entry, uri: str, folder: Path, quiet: bool) -> tuple[dict[str, Any], Any]:
    """Gate one model, in a process of its own; return its entry of the summary and its row of the table."""
    from diffdefend_core.stages.shown import report, summary
    from pipelines.local import run_gate

    sys.stderr = NamedLines(entry.name, sys.stderr)  # type: ignore[assignment]
    began = time.monotonic()
    settings = settings_for(entry, folder)
    result = run_gate(uri, settings, quiet=quiet)
    page = folder / f"{entry.name}.html"
    page.write_text(report(result["gate_uri"]), encoding="utf-8")
    facts = _facts(entry, result, settings)
    facts |= {"report": str(page), "seconds": round(time.monotonic() - began, 1)}
    return facts, summary(result["gate_uri"], result["scorecard_uri"], result["candidate_uri"])


def _facts(entry: Entry, result: dict[str, Any], settings: Settings) -> dict[str, Any]:
    candidate = read_record(Candidate, result["candidate_uri"], "candidate")
    verdict = read_record(Verdict, candidate.verdict_uri, "verdict")
    scorecard = read_record(Scorecard, result["scorecard_uri"], "scorecard")
    decision = read_record(GateDecision, result["gate_uri"], "gate_decision")
    model = read_record(ModelRef, candidate.model_uri, "model_ref")
    version = str(decision.version)
    return {
        "model": entry.name,
        "source_version": model.registered_version,
        "verdict": verdict.word.value,
        "probability": verdict.probability,
        "action": candidate.action.value,
        "outcome": decision.outcome.value,
        "asr_before": _value(scorecard.before, "asr_known", "asr"),
        "asr_after": _value(scorecard.after, "asr_known", "asr"),
        "fid_before": _value(scorecard.before, "fid"),
        "fid_after": _value(scorecard.after, "fid"),
        "rescan": candidate.purified.rescan.word.value if candidate.purified is not None else None,
        "registered_version": decision.version,
        "aliases": list(registry.aliases_of(settings.tracking_uri, entry.name, version)) if decision.version else [],
    }


def _value(metrics: Any, *names: str) -> float | None:
    return next((metrics[name].value for name in names if metrics and name in metrics), None)


def demo(folder: Path, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Run the demo into an empty `folder`; print the table; return what `summary.json` holds."""
    from rich.console import Console

    from diffdefend_core.report.table import summary_table

    if not ZOO.is_dir():
        raise InputError(
            f"there is no zoo at {ZOO}", expected="a clone of the repository", action="run the demo from a clone"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    uris = {entry: put_into_registry(entry, settings_for(entry, folder)) for entry in ENTRIES}
    print(f"scanning {' and '.join(uris.values())}; this takes some minutes", file=sys.stderr, flush=True)
    workers = min(len(ENTRIES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(run_one, entry, uri, folder, quiet) for entry, uri in uris.items()]
        results = [future.result() for future in started]
    facts = [item for item, _ in results]
    (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 160).print(summary_table([row for _, row in results]))
    for item in facts:
        print(f"report of {item['model']}: {item['report']}")
    print(f"summary: {folder / 'summary.json'}")
    return facts


def main() -> int:
    """Parse the command line and run; exit 0 when the demo ran, 2 when it could not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--to", type=Path, default=Path("runs/demo"), help="folder to write to; what it held is removed"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = parser.parse_args()
    try:
        demo(arguments.to.absolute(), quiet=arguments.quiet)
    except DiffDefendError as error:
        print(f"diffdefend: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
