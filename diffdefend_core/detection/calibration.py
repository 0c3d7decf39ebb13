"""Calibration: the detector's statistics over clean models, with a digest of its own.

No backdoored model is needed. Each statistic is standardised robustly: centre = median, spread = 1.4826 * median
absolute deviation, with a floor, since a handful of clean models may agree by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffdefend_core.artifacts import Statistic
from diffdefend_core.errors import InputError
from diffdefend_core.provenance import digest_of
from diffdefend_core.records import Record

# all statistics are logarithms of ratios: a spread of .25 is a factor of 1.28
SPREAD_FLOOR = 0.25
MINIMUM_MODELS, MINIMUM_RELATED = 8, 2
# the floor for a few models, and for models that are only related: other networks and data move a statistic by half
FEW_FLOOR, RELATED_FLOOR = 0.3, 0.4


@dataclass(frozen=True, kw_only=True)
class CleanModel(Record):
    """One clean model of a calibration: its name, content digest, family, process, shape and raw statistics."""

    name: str
    digest: str
    family: str
    process: str
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

    def kin(self, family: str, shape: tuple[int, ...], process: str) -> tuple[tuple[CleanModel, ...], float]:
        """Return the clean models that speak of a model, and the floor of their spreads; none and infinity without any.

        Those of its family and shape, the floor wider the fewer they are; else those of its process.
        """
        same = tuple(model for model in self.models if model.family == family and model.shape == shape)
        related = tuple(model for model in self.models if model.process == process)
        if len(same) >= MINIMUM_MODELS:
            return same, SPREAD_FLOOR
        if len(same) >= MINIMUM_RELATED:
            return same, FEW_FLOOR
        return (related, RELATED_FLOOR) if len(related) >= MINIMUM_RELATED else ((), math.inf)

    def without(self, digest: str) -> Calibration:
        """Return the calibration without the model of that content digest: no model vouches for itself."""
        kept = tuple(model for model in self.models if model.digest != digest)
        return Calibration(name=self.name, options_digest=self.options_digest, models=kept)


def standardise(
    models: Sequence[CleanModel], raw: Mapping[str, float], limit: float, floor: float = SPREAD_FLOOR
) -> dict[str, Statistic]:
    """Return each finite statistic with centre, spread and score z = (value - centre) / spread over the clean models.

    No spread is below `floor`. Raises InputError if there is no clean model, or one lacks a statistic.
    """
    if not models:
        raise InputError(
            "the calibration holds no clean model", expected="several", action="make one with `diffdefend calibrate`"
        )
    result = {}
    for name, value in raw.items():
        if not math.isfinite(value):
            continue
        lacking = [model.name for model in models if not math.isfinite(model.statistics.get(name, math.nan))]
        if lacking:
            raise InputError(
                f"the calibration has no {name} of {', '.join(lacking)}",
                expected="every statistic of every clean model",
                action="make it anew with this version of DiffDefend",
            )
        clean = [model.statistics[name] for model in models]
        center = statistics.median(clean)
        spread = max(floor, 1.4826 * statistics.median(abs(item - center) for item in clean))
        score = (value - center) / spread
        result[name] = Statistic(value=value, center=center, spread=spread, score=score, anomalous=score > limit)
    return result
