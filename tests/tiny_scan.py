"""Scans of tiny models in seconds: small options, and calibrations that lead to a chosen verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.io import folders
from diffdefend_core.stages.calibrations import measuring_digest

STATISTICS = ("twin_response", "x0_response", "moderate_response", "violation", "uniformity", "total_variation")
OPTIONS: dict[str, dict[str, object]] = {
    "inversion": {
        "own_samples": 8, "own_steps": 3, "twin_steps": 2, "twin_batch": 4, "starts": 2, "finalists": 1,
        "race_iterations": 1, "iterations": 2, "pairs": 1, "probe_pairs": 2,
    },
    "detection": {"samples": 8, "stochastic_steps": 4, "deterministic_steps": 3},
    # steps so large that the repaired model differs measurably
    "purification": {
        "steps": 4, "removal_batch": 2, "retention_batch": 2, "learning_rate": 0.03, "own_samples": 8, "own_steps": 3,
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
    return flags


def publish_calibration(folder: Path, statistics: Mapping[str, float], models: int = 8) -> str:
    """Publish a calibration of `models` clean models of the tiny shape, all with these statistics; return its URI."""
    clean = tuple(
        CleanModel(name=f"clean-{number}", digest=f"{number:064}", family="ddpm", shape=(3, 8, 8),
                   statistics=dict(statistics))
        for number in range(models)
    )  # fmt: skip
    digest = measuring_digest(load_settings(**OPTIONS))
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "calibration.json").write_text(Calibration(name="tiny", options_digest=digest, models=clean).to_json())
    uri = f"file://{folder}/published/"
    folders.publish(source, uri, stage="calibrate", key="tiny", producer="test")
    return uri


def calibration_for(folder: Path, word: str) -> str:
    """Return the URI of a calibration under which any tiny model gets this verdict."""
    level = {"clean": 100.0, "backdoored": -100.0, "inconclusive": 100.0}[word]
    return publish_calibration(folder, dict.fromkeys(STATISTICS, level), models=7 if word == "inconclusive" else 8)


def calibration_between(folder: Path, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return the URI of a calibration with a centre between two measurements of the response; images say nothing."""
    responses = {name: (before[name] + after[name]) / 2 for name in STATISTICS[:2]}
    return publish_calibration(folder, {**dict.fromkeys(STATISTICS, 100.0), **responses})
