"""The report as one JSON document: the records as they are, side by side."""

from __future__ import annotations

import json
from typing import Any

from diffdefend_core.report.bundle import ReportBundle

SCHEMA_VERSION = "1.0"


def render_json(bundle: ReportBundle) -> str:
    """Return the document as JSON with sorted keys; arrays are left out. Raises ValueError at a number not finite."""
    records = {
        "model_ref": bundle.model,
        "inverted_trigger": bundle.trigger,
        "verdict": bundle.verdict,
        "candidate": bundle.candidate,
        "scorecard": bundle.scorecard,
        "gate_decision": bundle.decision,
    }
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool": "diffdefend",
        "seed": bundle.seed,
        "config_digest": bundle.config_digest,
        "producers": dict(bundle.producers),
        "actions": list(bundle.actions),
        "forward_equivalents": bundle.forward_equivalents,
        **{name: record.to_dict() if record is not None else None for name, record in records.items()},
    }
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
