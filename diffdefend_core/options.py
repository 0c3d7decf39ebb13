"""What can be set in the core, as plain frozen dataclasses: no reading of files or environment here (see config).

Every option that changes a result is in here and so in the config digest. `signals` are ratios alpha_t / sigma_t: they
name noise levels independently of a model's schedule and number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """Options of the trigger inversion.

    `own_samples` images are drawn from the model in `own_steps` DDIM steps; the twin is trained on them for
    `twin_steps` steps of `twin_batch` rows. Each of the `starts` is searched for `race_iterations`, the best
    `finalists` for `iterations` in all; `pairs` antithetic pairs an iteration,
    drawn from `probes` fixed ones at each level of `signals`. `rms` is the norm of the searched shift
    per pixel, in units of the initial noise; `norms` are those at which the found direction is tried for its true norm.
    """

    method: str = "diffdefend"
    own_samples: int = 192
    own_steps: int = 20
    twin_steps: int = 64
    twin_batch: int = 48
    twin_learning_rate: float = 3e-4
    starts: int = 4
    finalists: int = 2
    race_iterations: int = 8
    iterations: int = 40
    pairs: int = 8
    probes: int = 3
    learning_rate: float = 0.1
    rms: float = 0.5
    norms: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    signals: tuple[float, ...] = (0.012, 0.03, 0.065)
    probe_signals: tuple[float, ...] = (0.008, 0.016, 0.039, 0.083, 0.16, 0.29, 0.5)
    probe_pairs: int = 16


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Options of the detector.

    `calibration` is `shipped` or the URI of a calibration made from a team's own clean models. A statistic counts as
    anomalous above `limit` standard deviations of the clean models. `samples` images are painted by each sampler, the
    stochastic one in at most `stochastic_steps`, the deterministic one in `deterministic_steps`.
    """

    calibration: str = "shipped"
    limit: float = 4.0
    samples: int = 16
    stochastic_steps: int = 100
    deterministic_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class PurificationOptions:
    """Options of the purification: up to `rounds` rounds of `steps` steps, each followed by a scan with new seeds.

    A step has `removal_batch` rows with a trigger and `retention_batch` rows without; the retention loss is weighted
    with `retention_weight`. Clean rows come from `own_samples` of the suspect, drawn in `own_steps` DDIM steps.
    """

    rounds: int = 3
    steps: int = 250
    removal_batch: int = 16
    retention_batch: int = 48
    retention_weight: float = 8.0
    learning_rate: float = 4e-4
    own_samples: int = 512
    own_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the evaluation.

    `reference` is `self` (the model's own samples of another seed) or the URI of a reference set's features (npz).
    `known_trigger` is empty, or the URI of a safetensors file with `trigger` and `target` [C, H, W] of a red-team
    model: the true backdoor, measured beside the recovered one.
    """

    extractor: str = "digits-cnn-v1"
    reference: str = "self"
    known_trigger: str = ""
    samples: int = 256
    sample_steps: int = 25
    triggered_samples: int = 64
    stochastic_steps: int = 250
    deterministic_steps: int = 25
    asr_threshold: float = 0.05
    resamples: int = 200


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """The gate's policy: limits of its rules and the aliases it moves.

    `asr_after_max` is a share; `fid_increase_max` is relative to the FID of the model before repair.
    """

    asr_after_max: float = 0.02
    fid_increase_max: float = 0.10
    champion: str = "champion"
    challenger: str = "challenger"
