"""The methods of detection that a scan can use: ours, and the peers it is compared with, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from diffdefend_core.artifacts import InvertedTrigger, ModelRef, Statistic, Verdict
from diffdefend_core.config import Settings
from diffdefend_core.detection import Calibration, Measurement, decide, judge, measure, peers
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.inversion import Inversion, elijah, invert, purediffusion, terd
from diffdefend_core.progress import Progress
from diffdefend_core.provenance import digest_of


@dataclass(frozen=True)
class Method:
    """How a trigger is searched, what is measured of it, and how standardised statistics become a score.

    `invert(suspect, model_digest, options, *, seed, progress)` returns an `Inversion`; `measure(suspect, record,
    triggers, options, *, seed, progress)` a `Measurement`. `group` and `measuring` name the groups of settings that
    hold their options.
    """

    name: str
    source: str
    invert: Callable[..., Inversion]
    measure: Callable[..., Measurement]
    score: Callable[[Mapping[str, Statistic]], float]
    group: str
    measuring: str

    def search_options(self, settings: Settings) -> Any:
        """Return the options of the search."""
        return getattr(settings, self.group)

    def measuring_options(self, settings: Settings) -> Any:
        """Return the options of the measurement."""
        return getattr(settings, self.measuring)

    def recorded(self, settings: Settings) -> dict[str, Any]:
        """Return what changes a statistic of this method: not the limit, nor which calibration or reference is used."""
        kept = {
            self.group: asdict(self.search_options(settings)),
            self.measuring: asdict(self.measuring_options(settings)),
        }
        for group in kept.values():
            for name in ("method", "reference", "worst_error", "calibration", "limit"):
                group.pop(name, None)
        return {"method": self.name, **kept}

    def digest(self, settings: Settings) -> str:
        """Return the sha256 (hex) over `recorded`: statistics of different digests cannot be compared."""
        return digest_of(self.recorded(settings))


METHODS = {
    method.name: method
    for method in (
        Method(
            "diffdefend", "ours: parity and monotonicity of the answers (docs/concepts.md)",
            invert, measure, decide.score, "inversion", "detection",
        ),
        Method(
            "terd", "TERD, ICML 2024 (docs/peers.md)",
            terd.invert, peers.measure_terd, peers.score_terd, "terd", "terd",
        ),
        Method(
            "elijah", "Elijah, AAAI 2024 (docs/peers.md)",
            elijah.invert, peers.measure_elijah, peers.score_elijah, "elijah", "elijah",
        ),
        Method(
            "purediffusion", "PureDiffusion, arXiv 2409.13945 and 2502.19047 (docs/peers.md)",
            purediffusion.invert, peers.measure_purediffusion, peers.score_purediffusion,
            "purediffusion", "purediffusion",
        ),
    )
}  # fmt: skip


def chosen(settings: Settings) -> Method:
    """Return the method that the settings name."""
    return METHODS[settings.inversion.method]


def search(
    denoiser: Denoiser,
    digest: str,
    settings: Settings,
    *,
    seed: int,
    progress: Progress,
    reference: Denoiser | None = None,
) -> Inversion:
    """Return the inversion of a model by the chosen method; a trusted reference is for ours alone."""
    method = chosen(settings)
    extra = {} if reference is None else {"reference": reference}
    return method.invert(denoiser, digest, method.search_options(settings), seed=seed, progress=progress, **extra)


def measured(
    denoiser: Denoiser,
    record: InvertedTrigger,
    triggers: Mapping[str, Tensor],
    settings: Settings,
    *,
    seed: int,
    progress: Progress,
) -> Measurement:
    """Return what the chosen method measures of an inverted trigger."""
    method = chosen(settings)
    return method.measure(denoiser, record, triggers, method.measuring_options(settings), seed=seed, progress=progress)


def judged(
    measurement: Measurement,
    record: InvertedTrigger,
    calibration: Calibration,
    settings: Settings,
    model: ModelRef,
    process: str,
) -> Verdict:
    """Return the verdict of a measurement by the chosen method, with the static findings on the model."""
    verdict = judge(
        measurement,
        record,
        calibration,
        limit=settings.detection.limit,
        family=model.family,
        shape=tuple(model.shape),
        process=process,
        score=chosen(settings).score,
    )
    return replace(verdict, findings=model.findings)
