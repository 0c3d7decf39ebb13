"""Measure the clean models of the zoo and write the calibration that the package ships: `python -m zoo.calibrate`.

With `--method` that of another method. Models that the repository does not hold are trained first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import diffdefend_core.detection as detection
from diffdefend_core.config import PEERS, Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.io.folders import content_digest
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.loading.static import inspect_folder
from diffdefend_core.progress import silent
from diffdefend_core.stages.methods import chosen, measured, search
from zoo.build import build, standard_zoo
from zoo.recipes import RECIPES

ALL = [recipe.name for recipe in RECIPES]
TARGET = Path(detection.__file__).parent / "calibrations"


def clean_model(name: str, folder: Path, settings: Settings) -> CleanModel:
    """Return one model with its raw statistics, by the steps of a scan."""
    inspection = inspect_folder(folder)
    suspect = load_denoiser(folder)
    digest = content_digest(inspection.files)
    found = search(suspect, digest, settings, seed=settings.seed, progress=silent)
    measurement = measured(suspect, found.record, found.triggers, settings, seed=settings.seed + 1, progress=silent)
    shown = {key: round(value, 3) for key, value in measurement.statistics.items()}
    print(name, measurement.sampler, shown, found.record.best, file=sys.stderr, flush=True)
    return CleanModel(
        name=name,
        digest=digest,
        family=inspection.family,
        process=suspect.kind,
        shape=tuple(inspection.shape),
        statistics=measurement.statistics,
    )


def main() -> None:
    """Measure and write: models that were measured with the same options before are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="clean models to measure now (default: all that lack)")
    parser.add_argument("--method", default="diffdefend", choices=["diffdefend", *PEERS])
    parser.add_argument("--anew", action="store_true", help="measure every model anew, after a change of the code")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    settings, zoo = load_settings(inversion={"method": arguments.method}), standard_zoo()
    digest, path = chosen(settings).digest(settings), TARGET / f"{arguments.method}.json"
    known = {} if arguments.anew else known_models(path, digest)
    for recipe in RECIPES:
        wanted = recipe.attack is None and recipe.name in (arguments.names or ALL)
        if wanted and shows(arguments.method, recipe.family) and recipe.name not in known:
            build(recipe, zoo)
            known[recipe.name] = clean_model(recipe.name, zoo.place(recipe), settings)
            models = tuple(known[item.name] for item in RECIPES if item.name in known)
            TARGET.mkdir(exist_ok=True)
            path.write_text(Calibration(name="the zoo", options_digest=digest, models=models).to_json())
    print(f"{len(known)} models, digest {Calibration.from_json(path.read_bytes()).digest()}")


def shows(method: str, family: str) -> bool:
    """Whether a method shows backdoors of a family: those of consistency models are not in what the peers measure."""
    return method == "diffdefend" or family != "consistency"


def known_models(path: Path, digest: str) -> dict[str, CleanModel]:
    """Return the models of an earlier calibration by name; none if it has other options, or another form."""
    try:
        calibration = Calibration.from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {model.name: model for model in calibration.models} if calibration.options_digest == digest else {}


if __name__ == "__main__":
    main()
