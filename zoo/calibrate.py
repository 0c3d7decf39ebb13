"""Measure the clean models of the zoo and write the calibration that the package ships: `python -m zoo.calibrate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import diffdefend_core.detection as detection
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.inversion import invert
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.loading.static import inspect_folder
from diffdefend_core.progress import silent
from diffdefend_core.stages.calibrations import measuring_digest
from zoo.build import HERE
from zoo.recipes import RECIPES

TARGET = Path(detection.__file__).parent / "calibrations" / "digits.json"


def measured(name: str, folder: Path, settings: Settings) -> CleanModel:
    """Return one model with its raw statistics, by the steps of a scan."""
    inspection = inspect_folder(folder)
    suspect = load_denoiser(folder)
    digest = content_digest(inspection.files)
    found = invert(suspect, digest, settings.inversion, seed=settings.seed, progress=silent)
    measurement = detection.measure(
        suspect,
        found.reference,
        found.record,
        found.triggers,
        settings.detection,
        seed=settings.seed + 1,
        progress=silent,
    )
    print(name, measurement.sampler, {key: round(value, 3) for key, value in measurement.statistics.items()},
          found.record.best, file=sys.stderr, flush=True)  # fmt: skip
    return CleanModel(
        name=name,
        digest=digest,
        family=inspection.family,
        shape=tuple(inspection.shape),
        statistics=measurement.statistics,
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=HERE, help="folder of the zoo")
    arguments = parser.parse_args()
    settings = load_settings()
    clean = [recipe.name for recipe in RECIPES if recipe.attack is None and recipe.family == "ddpm"]
    models = tuple(measured(name, arguments.zoo / name, settings) for name in clean)
    calibration = Calibration(name="digits 16x16, ddpm", options_digest=measuring_digest(settings), models=models)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(calibration.to_json())
    print(f"{len(models)} models, digest {calibration.digest()}")


if __name__ == "__main__":
    main()
