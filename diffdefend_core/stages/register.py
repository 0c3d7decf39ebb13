"""The register stage: decide, keep the evidence, tell the registry. No torch: it runs on a laptop in seconds.

It is never cached, because the registry may have changed, but it may be run again at any time: the same decision is
the same MLflow run, the same tags and the same version. What happens to aliases then is written in `announce`.
The folder holds the decision as it was made, with the aliases that it gives; it is published before they are given.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdefend_core.artifacts import (
    Candidate,
    GateDecision,
    InvertedTrigger,
    ModelRef,
    Parent,
    Scorecard,
    Verdict,
)
from diffdefend_core.config import Settings
from diffdefend_core.gate import rules
from diffdefend_core.gate.policy import Policy
from diffdefend_core.gate.signing import sign
from diffdefend_core.io import folders, registry, tracking
from diffdefend_core.provenance import code_version, digest_of
from diffdefend_core.records import Record
from diffdefend_core.report import pictures
from diffdefend_core.report.bundle import Array, ReportBundle
from diffdefend_core.report.document import render_json
from diffdefend_core.report.html import render_html
from diffdefend_core.stages import announce, attestation
from diffdefend_core.stages.candidate import agree, descends
from diffdefend_core.stages.folder import parent, read_record, run_once, write_record
from diffdefend_core.stages.policies import read_policy

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

STAGE = "register"
REPORT = "report.html"
POLICY = "policy.json"

_LOG = logging.getLogger(__name__)


def register(
    candidate_uri: str, scorecard_uri: str, *, settings: Settings, name: str | None = None, now: datetime | None = None
) -> str:
    """Decide on the candidate, tell the registry, and return the URI of `gate_decision.json` and `report.html`.

    `name` is the registered model that gets what passes: by default the one that the model came from, else its name.
    With a key the decision is signed; `now` (default: the clock) is the time that it bears and that waivers are judged
    by. Raises ArtifactError if the folders are not those of one run, RegistryError, InputError at a name, a policy or a
    key.
    """
    announce.check_aliases(settings.gate)
    policy, signer, now = read_policy(settings), attestation.signer(settings), now or datetime.now(UTC)
    inputs = _read(candidate_uri, scorecard_uri)
    target = registry.check_name(name or inputs.model.registered_name or inputs.model.name)
    decision = rules.decide(inputs.verdict, inputs.candidate, inputs.scorecard, policy, model_name=target, now=now)
    digests = [item.digest for item in inputs.parents]
    key = digest_of([*digests, target, settings.digest(), decision.policy_digest, decision.outcome.value])[:32]
    tags = {"diffdefend.outcome": decision.outcome.value, "diffdefend.verdict": inputs.verdict.word.value}
    if signer is None:
        _LOG.warning("the decision is unsigned: no signing key is configured")
    with tracking.open_run(settings.tracking_uri, settings.experiment, key=key, name=target, tags=tags) as run_id:
        case = _case(inputs, decision, settings, candidate_uri, key, run_id)
        told = announce.prepare(settings.tracking_uri, case)
        decision = _decided(decision, told, run_id)
        evidence = _Evidence(policy=policy, signer=signer, told=told, now=now)
        bundle = _bundle(inputs, settings, decision, (*told.actions, *evidence.remarks()))
        uri = _publish(inputs, settings, bundle, decision, evidence)
        _log(settings, run_id, bundle, uri)
        signed = attestation.tags(uri, told)
        announce.finish(settings.tracking_uri, case, told, f"{uri}{REPORT}", signed)
    return uri


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The verified records of one run, and the folders that the decision rests on."""

    model: ModelRef
    trigger: InvertedTrigger
    verdict: Verdict
    candidate: Candidate
    scorecard: Scorecard
    parents: tuple[Parent, ...]
    producers: Mapping[str, str]
    evaluated: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """How the decision is made evidence of: by which policy, signed by whom, if anybody, and when."""

    policy: Policy
    signer: CryptoSigner | None
    told: announce.Announcement
    now: datetime

    def policy_json(self) -> str:
        return json.dumps(self.policy.content(), indent=2, sort_keys=True) + "\n"

    def remarks(self) -> tuple[str, ...]:
        if self.signer is None:
            return ("The decision is unsigned: no signing key is configured.",)
        return (f"The decision is signed by the key {str(self.signer.public_key.keyid)[:12]}.",)

    def options(self, settings: Settings) -> object:
        if self.signer is None:
            return None
        return [self.signer.public_key.keyid, settings.signing.valid_days, attestation.period(settings, self.now)]

    def write(self, folder: Path, inputs: _Inputs, decision: GateDecision, valid_days: int) -> None:
        (folder / POLICY).write_text(self.policy_json(), encoding="utf-8")
        if self.signer is None:
            return
        records = (decision, inputs.model, inputs.verdict, inputs.candidate)
        signed = attestation.statements(*records, self.told, valid_days=valid_days, now=self.now)
        for name, statement in signed.items():
            (folder / name).write_text(sign(statement.to_bytes(), self.signer), encoding="utf-8")


def _read(candidate_uri: str, scorecard_uri: str) -> _Inputs:
    candidate = read_record(Candidate, candidate_uri, "candidate")
    action = candidate.action.value
    uris = {"load": candidate.model_uri, "invert_trigger": candidate.trigger_uri, "detect": candidate.verdict_uri}
    uris |= {action: candidate_uri, "evaluate": scorecard_uri}
    manifests = {stage: folders.finished(uri, stage) for stage, uri in uris.items()}
    for stage in ("load", "invert_trigger", "detect"):
        descends(manifests[action], candidate_uri, manifests[stage], uris[stage])
    descends(manifests["evaluate"], scorecard_uri, manifests[action], candidate_uri)
    model = read_record(ModelRef, candidate.model_uri, "model_ref")
    trigger = read_record(InvertedTrigger, candidate.trigger_uri, "inverted_trigger")
    verdict = read_record(Verdict, candidate.verdict_uri, "verdict")
    agree(model, trigger, verdict)
    return _Inputs(
        model=model,
        trigger=trigger,
        verdict=verdict,
        candidate=candidate,
        scorecard=read_record(Scorecard, scorecard_uri, "scorecard"),
        parents=(parent(action, candidate_uri), parent("evaluate", scorecard_uri)),
        producers={stage: manifest.producer for stage, manifest in manifests.items()},
        evaluated=_arrays(scorecard_uri, "samples.safetensors"),
    )


def _arrays(uri: str, name: str) -> dict[str, Array]:
    """Return the tensors of a file, or none if the stage wrote no such file: pictures decide nothing."""
    from safetensors.numpy import load

    manifest = folders.read_manifest(uri)
    if manifest is None or name not in {file.path for file in manifest.files}:
        return {}
    return dict(load(folders.read_file(uri, name)))


def _case(
    inputs: _Inputs, decision: GateDecision, settings: Settings, candidate_uri: str, key: str, run_id: str
) -> announce.Case:
    return announce.Case(
        key=key,
        run_id=run_id,
        candidate_uri=candidate_uri,
        model=inputs.model,
        verdict=inputs.verdict,
        candidate=inputs.candidate,
        decision=decision,
        options=settings.gate,
    )


def _decided(decision: GateDecision, told: announce.Announcement, run_id: str) -> GateDecision:
    return dataclasses.replace(
        decision,
        version=told.version.number if told.version is not None else None,
        original_version=told.original.number if told.original is not None else None,
        aliases=told.aliases,
        run_id=run_id,
    )


def _bundle(inputs: _Inputs, settings: Settings, decision: GateDecision, actions: tuple[str, ...]) -> ReportBundle:
    taus = _arrays(inputs.candidate.trigger_uri, "trigger.safetensors")
    return ReportBundle(
        model=inputs.model,
        trigger=inputs.trigger,
        verdict=inputs.verdict,
        candidate=inputs.candidate,
        scorecard=inputs.scorecard,
        decision=decision,
        options=settings.gate,
        actions=actions,
        seed=settings.seed,
        config_digest=settings.digest(),
        producers={**inputs.producers, STAGE: code_version()},
        taus={name.removeprefix("tau/"): array for name, array in taus.items() if name.startswith("tau/")},
        detected=_arrays(inputs.candidate.verdict_uri, "samples.safetensors"),
        evaluated=inputs.evaluated,
    )


def _publish(
    inputs: _Inputs, settings: Settings, bundle: ReportBundle, decision: GateDecision, evidence: _Evidence
) -> str:
    """Return the URI of the folder of this very decision: another state of the registry makes another folder.

    A signed one is also another when the key changes, and after half its validity, so that it can be renewed.
    """

    def work(folder: Path) -> None:
        write_record(folder, "gate_decision", decision)
        (folder / REPORT).write_text(render_html(bundle), encoding="utf-8")
        evidence.write(folder, inputs, decision, settings.signing.valid_days)

    options = {"decision": decision.to_dict(), "config": settings.digest(), "signed": evidence.options(settings)}
    return run_once(STAGE, store=settings.store, parents=inputs.parents, options=options, work=work)


def _log(settings: Settings, run_id: str, bundle: ReportBundle, uri: str) -> None:
    published = {name: folders.read_file(uri, name) for name in (REPORT, POLICY)}
    tracking.log(
        settings.tracking_uri,
        run_id,
        params=_params(bundle),
        metrics=_metrics(bundle),
        files={**published, "report.json": render_json(bundle).encode(), **_records(bundle), **_pictures(bundle)},
    )


def _params(bundle: ReportBundle) -> dict[str, Any]:
    aliases = {f"gate.{name}": getattr(bundle.options, name) for name in ("champion", "challenger")}
    decided = {"policy_digest": bundle.decision.policy_digest} if bundle.decision is not None else {}
    return {
        "model": bundle.model.name,
        "model_digest": bundle.model.digest,
        "family": bundle.model.family,
        "seed": bundle.seed,
        "config_digest": bundle.config_digest,
        "extractor": bundle.scorecard.extractor if bundle.scorecard is not None else None,
        "extractor_sha256": bundle.scorecard.extractor_sha256 if bundle.scorecard is not None else None,
        "reference": bundle.scorecard.reference if bundle.scorecard is not None else None,
        **aliases,
        **decided,
    }


def _metrics(bundle: ReportBundle) -> dict[str, float]:
    values = {"probability": bundle.verdict.probability, "forward_equivalents": float(bundle.forward_equivalents)}
    for name, item in bundle.verdict.statistics.items():
        values[f"z.{re.sub('[^A-Za-z0-9_.-]', '_', name)}"] = item.score
    if bundle.scorecard is not None:
        for side, metrics in (("before", bundle.scorecard.before), ("after", bundle.scorecard.after or {})):
            values |= {f"{name}_{side}": metric.value for name, metric in metrics.items()}
        for row in bundle.scorecard.attacks:
            for side, metrics in (("before", row.before), ("after", row.after or {})):
                values |= {f"{row.trigger}.{row.sampler}.{name}_{side}": item.value for name, item in metrics.items()}
    return values


def _records(bundle: ReportBundle) -> dict[str, bytes]:
    records: dict[str, Record | None] = {
        "model_ref": bundle.model,
        "inverted_trigger": bundle.trigger,
        "verdict": bundle.verdict,
        "candidate": bundle.candidate,
        "scorecard": bundle.scorecard,
        "gate_decision": bundle.decision,
    }
    return {f"records/{name}.json": item.to_json().encode() for name, item in records.items() if item is not None}


def _pictures(bundle: ReportBundle) -> dict[str, bytes]:
    shown = {f"detect_{name}": images for name, images in bundle.detected.items()}
    shown |= {f"evaluate_{name.replace('/', '_')}": images for name, images in bundle.evaluated.items()}
    drawn = {
        f"pictures/{name}.png": pictures.grid_png(images, columns=4, limit=16)
        for name, images in shown.items()
        if images.ndim == 4 and images.size
    }
    tau = bundle.taus.get(bundle.trigger.best)
    return drawn if tau is None or not tau.size else {"pictures/trigger.png": pictures.trigger_png(tau), **drawn}
