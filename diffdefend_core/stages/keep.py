"""The branch for a clean model: it goes on to the evaluation as it is."""

from __future__ import annotations

from diffdefend_core.artifacts import Action
from diffdefend_core.config import Settings
from diffdefend_core.stages.candidate import unchanged


def keep(model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings) -> str:
    """Return the URI of the keep folder: `candidate.json`.

    Raises InputError unless the verdict is clean, ArtifactError if the folders do not speak of one model.
    """
    return unchanged(Action.KEEP, model_uri, trigger_uri, verdict_uri, settings=settings)
