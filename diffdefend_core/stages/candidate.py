"""What keep and quarantine share: the candidate of a branch that does not change the model."""

from __future__ import annotations

from pathlib import Path

from diffdefend_core.artifacts import Action, Candidate, InvertedTrigger, Manifest, ModelRef, Parent, Verdict, Word
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError
from diffdefend_core.io import folders
from diffdefend_core.stages.folder import read_record, run_once, write_record


def unchanged(action: Action, model_uri: str, trigger_uri: str, verdict_uri: str, *, settings: Settings) -> str:
    """Return the URI of the candidate folder of `action`, keep or quarantine.

    Raises ArtifactError if the folders do not speak of one model, InputError if what is not clean should be kept.
    """
    parents = scanned(model_uri, trigger_uri, verdict_uri)
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


def scanned(model_uri: str, trigger_uri: str, verdict_uri: str) -> tuple[Parent, ...]:
    """Return the three folders of a scan as parents. Raises ArtifactError unless each was made from those before it."""
    uris = {"load": model_uri, "invert_trigger": trigger_uri, "detect": verdict_uri}
    manifests = {stage: folders.finished(uri, stage) for stage, uri in uris.items()}
    for child, ancestor in (("invert_trigger", "load"), ("detect", "load"), ("detect", "invert_trigger")):
        descends(manifests[child], uris[child], manifests[ancestor], uris[ancestor])
    return tuple(Parent(stage=stage, uri=uris[stage], digest=manifest.digest) for stage, manifest in manifests.items())


def descends(child: Manifest, child_uri: str, ancestor: Manifest, ancestor_uri: str) -> None:
    """Raise ArtifactError unless the folder `ancestor` went into the folder `child`."""
    if ancestor.digest not in {item.digest for item in child.parents}:
        raise ArtifactError(
            f"{child_uri} was not made from {ancestor_uri}",
            expected="the folders of one run",
            action="pass the folders of one run",
        )


def agree(model: ModelRef, trigger: InvertedTrigger, verdict: Verdict) -> None:
    """Raise ArtifactError unless trigger and verdict are those of the model."""
    for what, digest in (("trigger", trigger.model_digest), ("verdict", verdict.model_digest)):
        if digest != model.digest:
            raise ArtifactError(
                f"the {what} speaks of the model {digest[:12]}",
                expected=f"the model {model.digest[:12]}",
                action="pass the folders of one run",
            )
