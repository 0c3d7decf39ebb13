"""Where calibrations lie: shipped with the package, or at a URI."""

from __future__ import annotations

from importlib import resources

from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration
from diffdefend_core.errors import InputError
from diffdefend_core.io import folders
from diffdefend_core.stages.methods import chosen

SHIPPED = "diffdefend_core.detection", "calibrations"


def read_calibration(settings: Settings) -> Calibration:
    """Return the calibration that the settings name.

    Raises InputError if it was measured with other options, because its numbers would not be comparable, or if it
    holds no clean models.
    """
    if settings.detection.calibration == "shipped":
        calibration = Calibration.from_json(_shipped(chosen(settings).name))
    else:
        calibration = Calibration.from_json(folders.read_file(settings.detection.calibration, "calibration.json"))
    wanted = chosen(settings).digest(settings)
    if calibration.options_digest != wanted:
        raise InputError(
            f"calibration {calibration.name} was measured with options {calibration.options_digest[:12]}",
            expected=f"the options of this scan, {wanted[:12]}",
            action="use the default inversion and detection options, or calibrate anew with these",
        )
    if len({model.digest for model in calibration.models}) < 2:
        raise InputError(
            f"calibration {calibration.name} holds {len(calibration.models)} clean models",
            expected="several different ones, 8 for a verdict of clean",
            action="calibrate with more models",
        )
    return calibration


def _shipped(method: str) -> bytes:
    package, folder = SHIPPED
    file = resources.files(package) / folder / f"{method}.json"
    if not file.is_file():
        raise InputError(
            f"no calibration is shipped for the method {method}",
            expected="one made from your own clean models",
            action=f"make it with `diffdefend calibrate --method {method}`, and name it as detection.calibration",
        )
    return file.read_bytes()
