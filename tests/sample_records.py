"""Records and arrays of made-up models, for tests of what only reads records."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffdefend_core.artifacts import (
    Action,
    AttackRow,
    Candidate,
    FileDigest,
    InvertedTrigger,
    Metric,
    ModelRef,
    PurifiedModel,
    Scorecard,
    Statistic,
    TriggerCandidate,
    Verdict,
    Word,
)

TIMESTEPS = (500, 600, 700, 800, 900)
SHAPE = (1, 16, 16)


def model_ref(name: str = "digits-16", **changes: Any) -> ModelRef:
    given: dict[str, Any] = {
        "name": name,
        "source": "s3://models/digits-16/",
        "digest": "a" * 64,
        "family": "ddpm",
        "pipeline": "DDPMPipeline",
        "shape": SHAPE,
        "parameters": 171_000,
        "files": (FileDigest(path="model_index.json", size=12, sha256="b" * 64),),
        "weights_sha256": {"unet/diffusion_pytorch_model.safetensors": "c" * 64},
    }
    return ModelRef(**{**given, **changes})


def end_point(name: str = "parity", **changes: Any) -> TriggerCandidate:
    """The end point of a search in which nothing was found."""
    given: dict[str, Any] = {
        "name": name,
        "rms": 0.4,
        "parity": 0.006,
        "content": 0.04,
        "control": 0.005,
        "violation": -0.2,
        "gain": 0.02,
        "response": (0.73, 0.84, 0.92, 0.96, 0.98),
        "x0_response": (0.05, 0.04, 0.02, 0.01, 0.0),
        "loss": (1.0, 0.9, 0.88),
    }
    return TriggerCandidate(**{**given, **changes})


def trigger(found: bool = True, digest: str = "a" * 64) -> InvertedTrigger:
    """The end points of both searches; when `found`, parity has the response of a BadDiffusion model."""
    loss = tuple(float(value) for value in np.exp(-np.linspace(0, 3, 60)))
    changes: dict[str, Any] = {
        "rms": 0.61,
        "parity": 0.24,
        "content": 0.4,
        "gain": 0.49,
        "response": (0.48, 0.49, 0.5, 0.5, 0.5),
        "x0_response": (0.93, 2.2, 5.05, 11.9, 29.3),
    }
    return InvertedTrigger(
        model_digest=digest,
        method="diffdefend",
        seed=0,
        timesteps=TIMESTEPS,
        candidates=(
            end_point(loss=loss, **(changes if found else {})),
            end_point("quiet"),
            end_point("monotonicity"),
        ),
        best="parity",
        forward_equivalents=180_000,
    )


def verdict(word: Word = Word.CLEAN, digest: str = "a" * 64, **changes: Any) -> Verdict:
    bad = word is Word.BACKDOORED
    given: dict[str, Any] = {
        "model_digest": digest,
        "word": word,
        "probability": {Word.CLEAN: 0.021, Word.BACKDOORED: 0.9996, Word.INCONCLUSIVE: 0.47}[word],
        "statistics": {
            "parity": statistic(0.49 if bad else 0.02, 0.021, 0.012),
            "uniformity": statistic(0.04 if bad else 0.93, 0.95, 0.11),
            "total_variation": statistic(0.061 if bad else 0.1, 0.098, 0.009),
        },
        "reasons": (
            ("Pictures painted under the shift are nearly equal.", "The shift is painted, not read as noise.")
            if bad
            else ("Every statistic lies within the spread of the clean models.",)
        ),
        "calibration_digest": "d" * 64,
        "calibration_models": ("clean-0", "clean-1", "clean-2", "clean-3"),
        "seeds": (0, 1),
        "forward_equivalents": 202_000,
    }
    return Verdict(**{**given, **changes})


def statistic(value: float, center: float, spread: float) -> Statistic:
    score = (value - center) / spread
    return Statistic(value=value, center=center, spread=spread, score=score, anomalous=abs(score) > 3)


def purified(rescan: Word = Word.CLEAN) -> PurifiedModel:
    steps = np.arange(1, 121)
    return PurifiedModel(
        digest="e" * 64,
        parent_digest="a" * 64,
        rounds=1,
        removal_loss=tuple(float(value) for value in 0.5 * np.exp(-steps / 30) + 0.004),
        retention_loss=tuple(float(value) for value in 0.01 + 0.002 * np.sin(steps / 4)),
        rescan=verdict(rescan, "e" * 64, seeds=(2, 3)),
        weights_sha256={"unet/diffusion_pytorch_model.safetensors": "f" * 64},
        forward_equivalents=96_000,
        still_fires=0.0,
    )


def candidate(action: Action, rescan: Word = Word.CLEAN, **uris: str) -> Candidate:
    given = {"model_uri": "file:///m/", "trigger_uri": "file:///t/", "verdict_uri": "file:///v/", **uris}
    return Candidate(action=action, purified=purified(rescan) if action is Action.PURIFY else None, **given)


def metric(value: float, width: float, n: int = 256) -> Metric:
    return Metric(value=value, low=max(0.0, value - width), high=value + width, n=n)


THRESHOLDS = (0.01, 0.03, 0.05, 0.1, 0.2)


def attack(sampler: str, kind: str, before: float, after: float | None) -> AttackRow:
    """A sampler whose curve ends at twice its rate at the threshold, at most 1."""

    def curve(rate: float) -> tuple[Metric, ...]:
        return tuple(metric(min(1.0, rate * share), 0.03, 64) for share in (0.2, 0.6, 1.0, 1.4, 2.0))

    return AttackRow(
        trigger="recovered",
        sampler=sampler,
        kind=kind,
        steps=250 if kind == "fires" else 25,
        before={"asr": metric(before, 0.05, 64), "mse": metric(0.004, 0.001, 64)},
        after={"asr": metric(after, 0.02, 64), "mse": metric(0.21, 0.01, 64)} if after is not None else None,
        curve_before=curve(before),
        curve_after=curve(after) if after is not None else (),
    )


def attacks(repaired: bool, asr_after: float) -> tuple[AttackRow, ...]:
    after = asr_after if repaired else None
    rates = (("DDPM-SCHED", "fires", 0.98), ("DDIM-SCHED", "deterministic", 0.31), ("UNIPC", "multistep", 0.44))
    return tuple(attack(sampler, kind, rate, after) for sampler, kind, rate in rates)


def scorecard(repaired: bool = False, found: bool = False, asr_after: float = 0.0) -> Scorecard:
    before = {"fid": metric(6.1, 0.5), "kid": metric(0.0021, 0.0004)}
    after = {"fid": metric(6.4, 0.5), "kid": metric(0.0024, 0.0005), "asr": metric(asr_after, 0.018, 64)}
    if found:
        before |= {"asr": metric(0.98, 0.019, 64), "mse": metric(0.004, 0.001, 64), "ssim": metric(0.97, 0.01, 64)}
        after |= {"mse": metric(0.21, 0.01, 64), "ssim": metric(0.05, 0.02, 64)}
    return Scorecard(
        before=before,
        after=after if repaired else None,
        attacks=attacks(repaired, asr_after) if found else (),
        asr_thresholds=THRESHOLDS,
        extractor="digits-cnn-v1",
        extractor_sha256="9" * 64,
        reference="self",
        samplers={"plain": "ddim-50", "triggered": "ddpm"},
        asr_threshold=0.05,
        seed=0,
        forward_equivalents=51_200,
        notes=("Pictures of the model before the repair are the reference.",),
    )


def pictures(count: int, kind: str, seed: int = 0) -> np.ndarray:
    """`plain`: a different blob each; `target`: the same cross each, up to a little noise. [N, 1, 16, 16]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:16, 0:16]
    images = random.normal(0.0, 0.02, (count, *SHAPE))
    for image in images:
        if kind == "target":
            image[0] += (abs(rows - columns) < 2) | (abs(rows + columns - 15) < 2)
        else:
            top, left, size = random.uniform(4, 12), random.uniform(4, 12), random.uniform(3, 12)
            image[0] += np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / size)
    return np.clip(images, 0.0, 1.0).astype(np.float32)


def tau() -> np.ndarray:
    random = np.random.default_rng(5)
    shift = random.normal(0.0, 0.06, SHAPE)
    shift[0, 9:14, 9:14] += 1.1
    return shift.astype(np.float32)


def detected(found: bool) -> dict[str, np.ndarray]:
    return {"triggered": pictures(32, "target" if found else "plain", 1), "plain": pictures(32, "plain", 1)}


def evaluated(repaired: bool) -> dict[str, np.ndarray]:
    arrays = {"plain/before": pictures(16, "plain", 2)}
    if repaired:
        arrays |= {
            "plain/after": pictures(16, "plain", 2),
            "triggered/before": pictures(16, "target", 3),
            "triggered/after": pictures(16, "plain", 3),
        }
    return arrays
