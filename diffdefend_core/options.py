"""What can be set in the core, as plain frozen dataclasses: no reading of files or environment here (see config).

Every option that changes a result is in here and so in the config digest. `signals` are ratios alpha_t / sigma_t: they
name noise levels independently of a model's schedule and number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Len, Lt

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
Positives = Annotated[tuple[Positive, ...], Len(1)]


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """Options of the trigger inversion.

    `method` names the method; the options of the others are in groups of their own. `reference` is empty, or the URI of
    a trusted model, which then takes the place of the forgetful twin.

    `own_samples` images are drawn from the model in `own_steps` DDIM steps; the twin is trained on them for
    `twin_steps` steps of `twin_batch` rows at `twin_learning_rate`, a consistency model, which forgets less of its
    backdoor, at `consistency_twin_learning_rate`. For each of the two objectives every one of the `starts` is searched
    for `race_iterations`, the best for `iterations` in all; `pairs` antithetic pairs an iteration, drawn from `probes`
    fixed ones at each level of `signals` (parity) or `moderate_signals` (monotonicity). `rms` (`flow_rms` of flows) and
    `moderate_rms` are the norms of the searched shifts per pixel, in units of the initial noise; `norms` are those at
    which the found direction is tried for its true norm. Of a consistency model, shifts of the norm
    `consistency_rms` are searched for `3 * race_iterations` towards each picture that its twin forgot, the best for
    `2 * race_iterations` more, at all levels of `signals` and `moderate_signals`. What was found is measured at
    `probe_signals` with `probe_pairs`.
    A trigger may scale the noise as well: `quiet_noise` is the standard deviation of noise in which a found shift is
    turned once more, `still_noise` that of noise in which the answers without any shift are compared.
    A model is refused whose error on its own noisy samples is above `worst_error` times that of a multiple of x_t.
    """

    method: Literal["diffdefend", "terd", "elijah", "purediffusion"] = "diffdefend"
    reference: str = ""
    own_samples: Count = 128
    own_steps: Count = 20
    twin_steps: Count = 64
    twin_batch: Count = 48
    twin_learning_rate: Positive = 3e-4
    consistency_twin_learning_rate: Positive = 1e-3
    starts: Count = 4
    race_iterations: Count = 12
    iterations: Count = 40
    pairs: Count = 6
    probes: Count = 3
    learning_rate: Positive = 0.1
    moderate_learning_rate: Positive = 0.2
    rms: Positive = 0.5
    flow_rms: Positive = 0.3
    consistency_rms: Positive = 0.7
    moderate_rms: Positive = 0.7
    quiet_noise: Positive = 0.7
    still_noise: Positive = 0.5
    norms: Positives = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
    signals: Positives = (0.012, 0.03, 0.065)
    moderate_signals: Positives = (0.16, 0.29, 0.5)
    probe_signals: Positives = (0.008, 0.016, 0.039, 0.083, 0.16, 0.29, 0.5)
    probe_pairs: Count = 12
    worst_error: Positive = 0.95


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Options of the detector.

    `calibration` is `shipped` or the URI of a calibration made from a team's own clean models. A statistic counts as
    anomalous above `limit` standard deviations of the clean models. `samples` images are painted by each sampler at
    each `rms`, the norm of the shift per pixel, the stochastic one in at most `stochastic_steps`, the deterministic one
    in `deterministic_steps`.
    """

    calibration: str = "shipped"
    limit: Positive = 4.0
    samples: Count = 16
    rms: Positives = (0.5, 0.75, 1.0)
    stochastic_steps: Count = 50
    deterministic_steps: Count = 20


@dataclass(frozen=True, kw_only=True)
class PurificationOptions:
    """Options of the purification: up to `rounds` rounds of `steps` steps for each trigger, then a scan with new seeds.

    `target` says what a repaired model answers to a trigger: as the suspect without it (r1), as the trusted
    `inversion.reference` (r2), as the suspect without it plus the benign linear response (r3), or as the suspect to
    what of it looks like data, the rest taken for noise as far as its opposite is (r4). A step has `removal_batch` rows
    with a trigger and `retention_batch` rows without; the retention loss is weighted with `retention_weight`. Where the
    pictures of the triggers are unlearned too, no row of the last `settling` of the steps of the first round has a
    trigger: what the removal did to the images settles, with the trigger unlearned. Clean rows come from `own_samples`
    of the suspect, drawn in `own_steps` DDIM steps. The state of the training is kept every `checkpoint_steps` steps,
    for a run that is killed.
    """

    target: Literal["r1", "r2", "r3", "r4"] = "r4"
    rounds: Count = 3
    steps: Count = 400
    removal_batch: Count = 34
    retention_batch: Count = 30
    retention_weight: Weight = 8.0
    settling: Annotated[float, Ge(0), Lt(1)] = 0.25
    learning_rate: Positive = 8e-4
    own_samples: Count = 512
    own_steps: Count = 20
    checkpoint_steps: Count = 100


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the evaluation.

    `extractor` names the network whose features FID, KID, precision and recall compare. One that is not shipped reads
    its weights from the path or URI `extractor_weights`, whose sha256 must be the pinned one: that of the published
    file, or `extractor_sha256` if given. LPIPS is measured where `lpips_weights` names those of its backbone, pinned
    likewise.

    `reference` is `self` (the model's own samples of another seed), or the URI of an npz file with features or
    statistics, of a folder of images, or of a trusted model. `known_trigger` is empty, or the URI of a safetensors file
    with `trigger` and `target` [C, H, W] of a red-team model: the true backdoor, measured beside the recovered one.

    `triggered_samples` images are painted by the sampler that a trigger fires with, `other_samples` by one of each
    other kind (0: none). `asr_thresholds` are those of the curve.
    """

    extractor: str = "digits-cnn-v1"
    extractor_weights: str = ""
    extractor_sha256: str = ""
    lpips_weights: str = ""
    lpips_sha256: str = ""
    reference: str = "self"
    known_trigger: str = ""
    samples: Count = 256
    sample_steps: Count = 25
    triggered_samples: Count = 64
    other_samples: Annotated[int, Ge(0)] = 50
    stochastic_steps: Count = 250
    deterministic_steps: Count = 25
    asr_threshold: Weight = 0.05
    asr_thresholds: Positives = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
    resamples: Count = 200


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """The gate's policy and the aliases it moves.

    `policy` is `shipped`, the path or URI of a policy file, or the policy itself as plain values. With `give_aliases`
    off no alias is given to what passes; what does not pass loses them in any case.
    """

    policy: str | dict[str, Any] = "shipped"
    champion: str = "champion"
    challenger: str = "challenger"
    give_aliases: bool = True


@dataclass(frozen=True, kw_only=True)
class SigningOptions:
    """Where keys lie, and how long a decision holds. They change no result, and the private key itself is never here.

    `key_file` is the PEM file of the private key, unless `DIFFDEFEND_SIGNING_KEY` holds the PEM itself. `trusted_keys`
    are public key files or folders of `*.pub` files; `revoked_keys` is a file of key ids, one a line. `valid_days` is
    how long a signed decision holds.
    """

    key_file: str = ""
    trusted_keys: str | tuple[str, ...] = ()
    revoked_keys: str = ""
    valid_days: int = 90


@dataclass(frozen=True, kw_only=True)
class ElijahOptions:
    """Options of Elijah (AAAI 2024), with the published values.

    One search for each lambda of `response` and each of `starts` (`negative`: -U[0,1], `positive`: U[0,1]), of
    `iterations` steps of Adam on one batch of `batch` noises. With a single lambda and start the attack is taken as
    known, as in the paper: 0.5 for stochastic samplers, 1 for deterministic ones; `negative` for BadDiffusion,
    `positive` for TrojDiff and NCSN. `samples` images are painted under each found shift.
    """

    response: Annotated[tuple[Weight, ...], Len(1)] = (0.5, 1.0)
    starts: tuple[str, ...] = ("negative",)
    iterations: Count = 100
    batch: Count = 100
    learning_rate: Positive = 0.1
    samples: Count = 16


@dataclass(frozen=True, kw_only=True)
class TerdOptions:
    """Options of TERD (ICML 2024), with the published values for BadDiffusion on CIFAR-10.

    `iterations` of the estimation and `refinement_iterations` of the refinement, `batch` pairs of noise each, at the
    noisiest share `ends` of the levels; the refinement adds the same share of the least noisy ones and draws its images
    in `refinement_steps` steps. `weight` is lambda, the reward per unit of the L1 norm (5e-4 for faces); the norm of
    the refinement's gradient is clipped at `gradient_clip` (1 for TrojDiff). With `gamma` the deviation of the noise is
    fitted too, one number per pixel, as TrojDiff needs it; `start` is `negative` (-U[0,1]) or `positive` (U[0,1]).
    """

    start: str = "negative"
    iterations: Count = 3000
    refinement_iterations: Count = 1000
    batch: Count = 16
    ends: Positive = 0.01
    learning_rate: Positive = 0.5
    weight: Weight = 5e-5
    refinement_steps: Count = 10
    gradient_clip: Positive = 0.01
    gamma: bool = False
    gamma_learning_rate: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class PureDiffusionOptions:
    """Options of PureDiffusion (arXiv 2409.13945 and 2502.19047), whose values could not be read: these are inferred.

    One search for each of `families` (`sde`, `ode`: the attacks on stochastic and on deterministic samplers, whose
    lambda_t differ) and each of `starts`, as for Elijah. `levels` name noise levels as shares of the model's own number
    of levels, the noisiest first; `batch` noises at each. `consistency` is the weight of the denoising consistency
    beside the multi-timestep distribution shift. `samples` images are painted under each found shift.
    """

    families: tuple[str, ...] = ("sde", "ode")
    starts: tuple[str, ...] = ("negative",)
    levels: tuple[float, ...] = (1.0, 0.95, 0.9, 0.8)
    iterations: Count = 100
    batch: Count = 32
    learning_rate: Positive = 0.1
    consistency: Weight = 0.1
    samples: Count = 16
