"""The result of a scan as one JSON document for machines."""

from __future__ import annotations

from typing import Any

from diffdefend_core.artifacts import ModelRef, Verdict
from diffdefend_core.provenance import code_version
from diffdefend_core.scope import NOT_COVERED

SCHEMA_VERSION = "1.0"


def scan_document(
    model: ModelRef, verdict: Verdict, *, uris: dict[str, str], config_digest: str, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Return the document; `uris` holds `model_uri`, `trigger_uri` and `verdict_uri`, `seconds` is wall time."""
    plain = verdict.to_dict()
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "diffdefend",
        "code_version": code_version(),
        "model": {"name": model.name, "source": model.source, "family": model.family, "shape": list(model.shape)},
        "model_digest": model.digest,
        "verdict": verdict.word.value,
        "probability": verdict.probability,
        "statistics": plain["statistics"],
        "reasons": plain["reasons"],
        "findings": plain["findings"],
        "not_covered": [name for name, _ in NOT_COVERED],
        **uris,
        "seeds": plain["seeds"],
        "config_digest": config_digest,
        "calibration_digest": verdict.calibration_digest,
        "forward_equivalents": verdict.forward_equivalents,
        "seconds": round(seconds, 3),
    }
