"""What keep and quarantine share: the candidate of a branch that does not change the model."""

from __future__ import annotations

from pathlib import Path

from diffdefend_core.artifacts import Action, Candidate, InvertedTrigger, ModelRef, Verdict, Word
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record


def unchanged(action: Action, model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings) -> str:
    """Return the URI of the candidate folder of `action`, keep or quarantine.

    Raises ArtifactError if the folders do not speak of one model, InputError if what is not clean should be kept.
    """
    parents = (parent("load", model_uri), parent("invert_trigger", trigger_uri), parent("detect", verdict_uri))
    verdict = read_record(Verdict, verdict_uri, "verdict")
    if action is Action.KEEP and verdict.word is not Word.CLEAN:
        raise InputError(
            f"the verdict is {verdict.word}",
            expected="clean, to keep the model as it is",
            action="purify or quarantine",
        )
    agree(
        read_record(ModelRef, model_uri, "model_ref"),
        read_record(InvertedTrigger, trigger_uri, "inverted_trigger"),
        verdict,
    )
    candidate = Candidate(action=action, model_uri=model_uri, trigger_uri=trigger_uri, verdict_uri=verdict_uri)

    def work(folder: Path) -> None:
        write_record(folder, "candidate", candidate)

    return run_once(action.value, store=settings.store, parents=parents, options={}, work=work)


def agree(model: ModelRef, trigger: InvertedTrigger, verdict: Verdict) -> None:
    """Raise ArtifactError unless trigger and verdict are those of the model."""
    for what, digest in (("trigger", trigger.model_digest), ("verdict", verdict.model_digest)):
        if digest != model.digest:
            raise ArtifactError(
                f"the {what} speaks of the model {digest[:12]}",
                expected=f"the model {model.digest[:12]}",
                action="pass the folders of one run",
            )
