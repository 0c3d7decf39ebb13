"""Where calibrations lie: shipped with the package, or at a URI."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources

from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration
from diffdefend_core.errors import InputError
from diffdefend_core.io import folders
from diffdefend_core.provenance import digest_of

SHIPPED = "diffdefend_core.detection", "calibrations/digits.json"


def read_calibration(settings: Settings) -> Calibration:
    """Return the calibration that the settings name.

    Raises InputError if it was measured with other options, because its numbers would not be comparable, or if it
    holds no clean models.
    """
    if settings.detection.calibration == "shipped":
        package, name = SHIPPED
        calibration = Calibration.from_json((resources.files(package) / name).read_bytes())
    else:
        calibration = Calibration.from_json(folders.read_file(settings.detection.calibration, "calibration.json"))
    wanted = measuring_digest(settings)
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


def measuring_digest(settings: Settings) -> str:
    """Return the digest of the options that change a statistic: not the limit, nor which calibration is used."""
    detection = asdict(settings.detection)
    del detection["calibration"], detection["limit"]
    return digest_of({"inversion": asdict(settings.inversion), "detection": detection})
