"""Everything that a report shows: the records of one model and the arrays beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffdefend_core.artifacts import (
    Candidate,
    GateDecision,
    InvertedTrigger,
    ModelRef,
    PurifiedModel,
    Scorecard,
    TriggerCandidate,
    Verdict,
)
from diffdefend_core.options import GateOptions

Array: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class ReportBundle:
    """The records of one model, as far as they are there, and their arrays.

    `taus` are the trigger candidates by name, [C, H, W] in the model's own units. `detected` holds `triggered` and
    `plain`, `evaluated` holds `plain/before`, `plain/after`, `triggered/before`, `triggered/after`, all [N, C, H, W]
    in [0, 1]; any may be missing. `actions` are sentences on what the registry was told, `producers` the code version
    by stage.
    """

    model: ModelRef
    trigger: InvertedTrigger
    verdict: Verdict
    candidate: Candidate | None = None
    scorecard: Scorecard | None = None
    decision: GateDecision | None = None
    options: GateOptions = field(default_factory=GateOptions)
    actions: tuple[str, ...] = ()
    seed: int | None = None
    config_digest: str | None = None
    producers: Mapping[str, str] = field(default_factory=dict)
    taus: Mapping[str, Array] = field(default_factory=dict)
    detected: Mapping[str, Array] = field(default_factory=dict)
    evaluated: Mapping[str, Array] = field(default_factory=dict)

    @property
    def purified(self) -> PurifiedModel | None:
        """The repaired model, if there is one."""
        return self.candidate.purified if self.candidate is not None else None

    @property
    def best(self) -> TriggerCandidate | None:
        """The strongest trigger candidate, None if the search left none of that name."""
        return next((item for item in self.trigger.candidates if item.name == self.trigger.best), None)

    @property
    def forward_equivalents(self) -> int:
        """The network evaluations of single samples over all stages (forward 1, forward and backward 3)."""
        spent = self.verdict.forward_equivalents
        spent += self.purified.forward_equivalents if self.purified is not None else 0
        return spent + (self.scorecard.forward_equivalents if self.scorecard is not None else 0)
