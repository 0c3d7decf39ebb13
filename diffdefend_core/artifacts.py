"""The records that travel between the stages. Each is written as `<snake_case name>.json` in its stage's folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from diffdefend_core.records import Record


class Word(StrEnum):
    """A verdict: a closed word. Could-not-tell is a word of its own and never fine."""

    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"


class Action(StrEnum):
    """What the branch did with the model."""

    KEEP = "keep"
    PURIFY = "purify"
    QUARANTINE = "quarantine"


class Outcome(StrEnum):
    """What the gate decided: the model itself passes, its repaired version passes, or nothing passes."""

    PROMOTED = "promoted"
    REPAIRED = "repaired"
    QUARANTINED = "quarantined"


class RuleResult(StrEnum):
    """A gate rule passes, fails, or could not be evaluated; only the first does not block."""

    PASS = "pass"
    FAIL = "fail"
    NOT_EVALUATED = "not_evaluated"


@dataclass(frozen=True, kw_only=True)
class FileDigest(Record):
    """One file of a folder: its relative POSIX path, size in bytes and sha256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Parent(Record):
    """A stage folder that went into another: its stage, URI and the digest of its files."""

    stage: str
    uri: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """What a stage folder holds; written last, so that a folder without one is unfinished.

    `digest` is the sha256 over the sorted (path, sha256) of `files`; `producer` names the code version. `seal` is the
    sha256 of the manifest without it, so that a changed bit in any field is noticed; it is no signature. Manifests of
    version 1.0 have none.
    """

    schema_version: str = "1.1"
    stage: str
    key: str
    producer: str
    digest: str
    files: tuple[FileDigest, ...]
    parents: tuple[Parent, ...] = ()
    seal: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelRef(Record):
    """A model that passed the static checks; its files lie in `model/` of the load folder.

    `digest` is the sha256 over the sorted (path, sha256) of the model's files, `weights_sha256` those of its weight
    files; `shape` is (C, H, W); `findings` are remarks of the static checks that did not refuse it. `pickles` are the
    files at the source that the weights were converted from; no such file lies in `model/`.
    """

    name: str
    source: str
    digest: str
    family: str
    pipeline: str
    shape: tuple[int, ...]
    parameters: int
    files: tuple[FileDigest, ...]
    weights_sha256: dict[str, str]
    registered_name: str | None = None
    registered_version: str | None = None
    findings: tuple[str, ...] = ()
    pickles: tuple[FileDigest, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TriggerCandidate(Record):
    """One end point of the search; its tensors are `tau/<name>` in `trigger.safetensors`.

    Measured on fresh noise over `timesteps`: `parity` is how evenly the suspect answers to the shift and its opposite
    beyond what the reference does, relative to the shift, at the noisy ones; `content` is how far the predicted x0
    moves evenly at the others, over the spread of the data; `control` is the largest parity of shifts of the same norm
    that are no trigger; `violation` is how far it moves against the shift, which an ideal network never lets it (above
    0: it does). The candidates of a consistency model that lead to a picture (`parity`, `picture-2`, ...) have as their
    parity how far the mean image is from that of the reference, over how far the images are apart, and as their control
    that of the opposite shift, at least 1. `gain` is the share of the shift that the suspect does not treat as noise;
    `response` is lambda_t and `x0_response` is c_t minus that of the reference (algorithms.md 5.2; both are empty where
    a method does not measure them). `rms` is the estimated norm per pixel.
    """

    name: str
    rms: float
    parity: float
    content: float
    control: float
    violation: float
    gain: float
    response: tuple[float, ...]
    x0_response: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class InvertedTrigger(Record):
    """The result of the trigger inversion, found or not; `best` names the strongest candidate.

    `forward_equivalents` counts network evaluations of single samples: forward 1, forward and backward 3.
    """

    model_digest: str
    method: str
    seed: int
    timesteps: tuple[int, ...]
    candidates: tuple[TriggerCandidate, ...]
    best: str
    forward_equivalents: int


@dataclass(frozen=True, kw_only=True)
class Statistic(Record):
    """A detector statistic: its value, the centre and spread over clean models, and the standardised score z."""

    value: float
    center: float
    spread: float
    score: float
    anomalous: bool


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """The detector's answer: a word, the probability of a backdoor in [0, 1], and every statistic behind it.

    `calibration_digest` names the clean models that the statistics were standardised against; `reasons` are
    sentences for people. Images that the model paints under the trigger lie in `samples.safetensors`.
    `findings` are the remarks of the static checks on the model. `forward_equivalents` counts the whole scan, the
    inversion included.
    """

    model_digest: str
    word: Word
    probability: float
    statistics: dict[str, Statistic]
    reasons: tuple[str, ...]
    calibration_digest: str
    calibration_models: tuple[str, ...]
    seeds: tuple[int, ...]
    forward_equivalents: int
    findings: tuple[str, ...] = ()


# a repaired model may paint the picture of a found shift in this share of the cases
MAY_FIRE = 0.01


@dataclass(frozen=True, kw_only=True)
class PurifiedModel(Record):
    """A repaired model in `model/` of the purify folder, and how it was made.

    `rounds` counts the purification rounds up to it, and `rounds_tried` all: the model is that of the round that left
    least. `removal_loss` and `retention_loss` are the curves of its round; `rescan` is the verdict of the same scan
    with new seeds; `forward_equivalents` are those of all rounds. `still_fires` is the largest success rate that a
    found shift has left, over samplers of each kind; None if none led to one picture before, so that the scan alone
    says what is left. `further_triggers` counts those that were removed beside the ones that the scan found.
    """

    schema_version: str = "1.4"

    digest: str
    parent_digest: str
    rounds: int
    removal_loss: tuple[float, ...]
    retention_loss: tuple[float, ...]
    rescan: Verdict
    weights_sha256: dict[str, str]
    forward_equivalents: int
    still_fires: float | None = None
    further_triggers: int = 0
    rounds_tried: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether no found shift paints its picture in more than MAY_FIRE of the cases."""
        return self.still_fires is None or self.still_fires <= MAY_FIRE


@dataclass(frozen=True, kw_only=True)
class Candidate(Record):
    """What leaves the branch: the model kept, repaired or quarantined. The URIs name stage folders.

    `purified` is there exactly when `action` is purify.
    """

    action: Action
    model_uri: str
    trigger_uri: str
    verdict_uri: str
    purified: PurifiedModel | None = None


@dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """A measured value with its bootstrap interval [low, high] and the number of samples n.

    `basis` says what a distance was measured with: extractor, the sha256 of its weights and the reference. Values of
    different bases are never compared; it is empty where a value needs none.
    """

    schema_version: str = "1.1"
    value: float
    low: float
    high: float
    n: int
    basis: str = ""


@dataclass(frozen=True, kw_only=True)
class AttackRow(Record):
    """One trigger, `recovered` or `known`, fired with one sampler; the same seeds before and after.

    `kind` is `fires` for the sampler that the attack is made for, else `stochastic`, `deterministic` or `multistep`.
    Metrics: `asr`, `mse`, `ssim`, and `lpips` where its weights were given. The curves are the attack success rate at
    each of the scorecard's `asr_thresholds`.
    """

    trigger: str
    sampler: str
    kind: str
    steps: int
    before: dict[str, Metric]
    after: dict[str, Metric] | None = None
    curve_before: tuple[Metric, ...]
    curve_after: tuple[Metric, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scorecard(Record):
    """Metrics of the model `before` and, if it was repaired, `after`; the same seeds for both.

    Keys: `fid`, `kid`, `precision`, `recall`, and with a trigger `asr`, `mse`, `ssim`, `lpips` (of images painted under
    the recovered trigger against its target, by the sampler that it fires with), the same with `_known` for the true
    trigger of a red-team model. `attacks` holds the same for every sampler that was fired. `extractor` names the
    feature extractor, `extractor_sha256` its weights; `reference` says what the FID is measured against, and with
    `self_reference` that is the model's own samples of another seed, so that the FID before is sampling noise alone.
    Pictures lie in `samples.safetensors` (`plain/before`, `plain/after`, `triggered/before`, `triggered/after`, all
    [N, C, H, W] in [0, 1]).
    """

    schema_version: str = "1.1"
    before: dict[str, Metric]
    after: dict[str, Metric] | None
    attacks: tuple[AttackRow, ...] = ()
    extractor: str
    extractor_sha256: str
    reference: str
    self_reference: bool = False
    samplers: dict[str, str]
    asr_threshold: float
    asr_thresholds: tuple[float, ...] = ()
    seed: int
    forward_equivalents: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule(Record):
    """One rule of the gate, with what it compared; `margin` is not negative when it passes.

    A rule that is not `blocking` only warns when it fails. `waived` says that somebody answers for its failing.
    """

    id: str
    statement: str
    result: RuleResult
    value: float | None = None
    limit: float | None = None
    margin: float | None = None
    blocking: bool = True
    waived: bool = False

    @property
    def blocks(self) -> bool:
        """Whether nothing may pass because of this rule: what could not be evaluated blocks in any case."""
        if self.result is RuleResult.FAIL:
            return self.blocking and not self.waived
        return self.result is not RuleResult.PASS


@dataclass(frozen=True, kw_only=True)
class UsedWaiver(Record):
    """A waiver that a decision used; `expires` is `2026-01-31T12:00:00Z`, `digest` that of all its fields."""

    rule: str
    statement: str
    owner: str
    expires: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class GateDecision(Record):
    """The gate's decision and what the registry was told.

    `version` is the registered version that the decision is about (the repaired one if there is one).
    """

    outcome: Outcome
    model_name: str
    model_digest: str
    policy_digest: str
    rules: tuple[Rule, ...]
    version: str | None = None
    original_version: str | None = None
    aliases: tuple[str, ...] = field(default=())
    run_id: str | None = None
    waivers: tuple[UsedWaiver, ...] = ()
