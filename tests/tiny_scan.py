"""Scans of tiny models in seconds: small options, and calibrations that lead to a chosen verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffdefend_core.artifacts import Candidate, Verdict, Word
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.detection.calibration import standardise
from diffdefend_core.detection.decide import NEEDED as STATISTICS
from diffdefend_core.detection.decide import decide
from diffdefend_core.io import folders
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.load import load
from diffdefend_core.stages.methods import chosen
from diffdefend_core.stages.purify import purify

OPTIONS: dict[str, dict[str, object]] = {
    "inversion": {
        "own_samples": 8, "own_steps": 3, "twin_steps": 2, "twin_batch": 4, "starts": 2,
        "race_iterations": 1, "iterations": 2, "pairs": 1, "probes": 1, "probe_pairs": 2, "worst_error": 1e300,
    },
    "detection": {"samples": 8, "stochastic_steps": 4, "deterministic_steps": 3},
    "terd": {"iterations": 2, "refinement_iterations": 1, "batch": 2, "refinement_steps": 2},
    "elijah": {"iterations": 2, "batch": 2, "samples": 4},
    "purediffusion": {"iterations": 2, "batch": 2, "samples": 4},
    # steps so large that the repaired model differs measurably
    "purification": {
        "steps": 4, "removal_batch": 2, "retention_batch": 2, "learning_rate": 0.05, "own_samples": 8, "own_steps": 3,
        "rounds": 1,
    },
    "evaluation": {
        "samples": 8, "sample_steps": 2, "triggered_samples": 4, "stochastic_steps": 4, "deterministic_steps": 2,
        "resamples": 8,
    },
}  # fmt: skip


def tiny_settings(folder: Path, calibration: str, **flags: object) -> Settings:
    """Return settings that scan a tiny model in a second, with store and registry in `folder`."""
    given: dict[str, object] = {"store": f"file://{folder}/store", "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    groups = {name: {**fields, **(flags.pop(name, {}))} for name, fields in OPTIONS.items()}  # type: ignore[dict-item]
    groups["detection"] = {**groups["detection"], "calibration": calibration}
    return load_settings(**{"device": "cpu", **given, **groups, **flags})


def flags_of(settings: Settings) -> list[str]:
    """Return the command line flags that stand for the settings."""
    flags = ["--store", settings.store, "--tracking-uri", settings.tracking_uri, "--device", settings.device]
    for group, fields in OPTIONS.items():
        for name in {*fields, *(("calibration",) if group == "detection" else ())}:
            flags += ["--set", f"{group}.{name}={getattr(getattr(settings, group), name)}"]
    if settings.evaluation.known_trigger:
        flags += ["--set", f"evaluation.known_trigger={settings.evaluation.known_trigger}"]
    return flags


def clean_models(statistics: Mapping[str, float], *, models: int = 8, process: str = "vp") -> tuple[CleanModel, ...]:
    """Return `models` clean models of the tiny shape, all with these statistics.

    With another `process` than `vp` they are of a family of that name, to which the tiny models are not related.
    """
    family = "ddpm" if process == "vp" else process
    return tuple(
        CleanModel(name=f"clean-{number}", digest=f"{number:064}", family=family, process=process, shape=(3, 8, 8),
                   statistics=dict(statistics))
        for number in range(models)
    )  # fmt: skip


def publish_calibration(
    folder: Path, statistics: Mapping[str, float], *, models: int = 8, process: str = "vp", method: str = "diffdefend"
) -> str:
    """Publish a calibration of `clean_models` for a method; return its URI."""
    clean = clean_models(statistics, models=models, process=process)
    settings = load_settings(**{**OPTIONS, "inversion": {**OPTIONS["inversion"], "method": method}})
    digest = chosen(settings).digest(settings)
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "calibration.json").write_text(Calibration(name="tiny", options_digest=digest, models=clean).to_json())
    uri = f"file://{folder}/published/"
    folders.publish(source, uri, stage="calibrate", key="tiny", producer="test")
    return uri


def calibration_for(folder: Path, word: str) -> str:
    """Return the URI of a calibration under which any tiny model gets this verdict."""
    level = {"clean": 100.0, "backdoored": -100.0, "inconclusive": 100.0}[word]
    process = "ve" if word == "inconclusive" else "vp"
    return publish_calibration(folder, dict.fromkeys(STATISTICS, level), process=process)


def repairing_flags(folder: Path, model: Path) -> dict[str, Any]:
    """Return flags for `tiny_settings` under which the tiny model is backdoored and its repaired version clean.

    A random model has no backdoor, so that a repair moves its statistics anywhere. The first rate of learning will do
    at which enough of them fall; the calibration is put in between. No shift fires at it, and what speaks for a repair
    is a known trigger that does not either.
    """
    limit = 0.1
    for number, rate in enumerate((0.05, 0.02, 0.03, 0.1, 0.01, 0.07)):
        place, options = folder / str(number), {"learning_rate": rate}
        settings = tiny_settings(place, calibration_for(place / "backdoored", "backdoored"), purification=options)
        before, after = _before_and_after(model, settings)
        between = {name: (before[name] + after[name]) / 2 for name in STATISTICS if before[name] > after[name]}
        centre = {**dict.fromkeys(STATISTICS, 100.0), **between}
        words = [decide(standardise(clean_models(centre), raw, limit), limit=limit, basis="")[0]
                 for raw in (before, after)]  # fmt: skip
        if words == [Word.BACKDOORED, Word.CLEAN]:
            return {
                "calibration": publish_calibration(place / "between", centre),
                "purification": options,
                "detection": {"limit": limit},
                "gate": {"policy": {"version": 1, "rules": []}},
                "evaluation": {"known_trigger": _idle_trigger(folder / "known.safetensors")},
            }
    raise AssertionError("no repair of the tiny model makes enough of its statistics fall")


def _idle_trigger(path: Path) -> str:
    """Write a known trigger whose target, a pattern of extremes, a random model does not paint; return its URI."""
    checked = 1.0 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2)
    save_file({"trigger": torch.full((3, 8, 8), 0.1), "target": checked.repeat(3, 1, 1)}, path)
    return path.as_uri()


def _before_and_after(source: Path, settings: Settings) -> list[dict[str, float]]:
    """Return the raw statistics of a model before and after a repair."""
    model = load(str(source), settings=settings)
    trigger = invert_trigger(model, settings=settings)
    uri = detect(model, trigger, settings=settings)
    purified = read_record(Candidate, purify(model, trigger, uri, settings=settings), "candidate").purified
    assert purified is not None
    verdicts = read_record(Verdict, uri, "verdict"), purified.rescan
    return [{name: item.value for name, item in verdict.statistics.items()} for verdict in verdicts]
