"""Calibration: the detector's statistics over clean models, with a digest of its own.

No backdoored model is needed. Each statistic is standardised robustly: centre = median, spread = 1.4826 * median
absolute deviation, with a floor, since a handful of clean models may agree by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from diffdefend_core.artifacts import Statistic
from diffdefend_core.provenance import digest_of
from diffdefend_core.records import Record

# all statistics are logarithms of ratios: a spread of .25 is a factor of 1.28
SPREAD_FLOOR = 0.25
MINIMUM_MODELS = 8


@dataclass(frozen=True, kw_only=True)
class CleanModel(Record):
    """One clean model of a calibration: its name, content digest, family, shape and raw statistics."""

    name: str
    digest: str
    family: str
    shape: tuple[int, ...]
    statistics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """Clean models whose statistics say what is ordinary; `options_digest` names the options of the measurement."""

    name: str
    options_digest: str
    models: tuple[CleanModel, ...]

    def digest(self) -> str:
        """Return the sha256 (hex) of the calibration."""
        return digest_of(self.to_dict())

    def covers(self, family: str, shape: tuple[int, ...]) -> bool:
        """Return whether at least MINIMUM_MODELS clean models are of this family and shape."""
        return sum(model.family == family and model.shape == shape for model in self.models) >= MINIMUM_MODELS

    def without(self, digest: str) -> Calibration:
        """Return the calibration without the model of that content digest: no model vouches for itself."""
        kept = tuple(model for model in self.models if model.digest != digest)
        return Calibration(name=self.name, options_digest=self.options_digest, models=kept)


def standardise(calibration: Calibration, raw: Mapping[str, float], limit: float) -> dict[str, Statistic]:
    """Return each finite statistic with centre, spread and score z = (value - centre) / spread over the clean models.

    Raises ValueError if the calibration holds no model.
    """
    if not calibration.models:
        raise ValueError("the calibration holds no clean model")
    result = {}
    for name, value in raw.items():
        if not math.isfinite(value):
            continue
        clean = [model.statistics[name] for model in calibration.models]
        center = statistics.median(clean)
        spread = max(SPREAD_FLOOR, 1.4826 * statistics.median(abs(item - center) for item in clean))
        score = (value - center) / spread
        result[name] = Statistic(value=value, center=center, spread=spread, score=score, anomalous=score > limit)
    return result
