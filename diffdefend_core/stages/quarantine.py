"""The branch for all that is neither clean nor to be repaired: it is measured, but it will not pass the gate."""

from __future__ import annotations

from diffdefend_core.artifacts import Action
from diffdefend_core.config import Settings
from diffdefend_core.stages.candidate import unchanged


def quarantine(model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings) -> str:
    """Return the URI of the quarantine folder: `candidate.json`. Any verdict may be quarantined.

    Raises ArtifactError if the folders do not speak of one model.
    """
    return unchanged(Action.QUARANTINE, model_uri, trigger_uri, verdict_uri, settings=settings)
