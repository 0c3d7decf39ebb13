"""The report as ONE HTML file: no script, no link, no asset from outside; everything that is shown is inside."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diffdefend_core.artifacts import (
    Action,
    AttackRow,
    Metric,
    Outcome,
    PurifiedModel,
    Rule,
    RuleResult,
    Statistic,
    Word,
)
from diffdefend_core.report import charts, pictures
from diffdefend_core.report.bundle import Array, ReportBundle
from diffdefend_core.report.pages import template
from diffdefend_core.report.text import ABSENT, number, percent, probability, score

ACCENTS = {Word.CLEAN: "#1d6f42", Word.BACKDOORED: "#a61b29", Word.INCONCLUSIVE: "#8a5a00"}
WIDEST_Z = 10.0
SAMPLES = 16
PAIRS = 10
SHARES = {"fid-after", "precision", "recall"}
KINDS = {
    "fires": "the one that it fires with",
    "stochastic": "stochastic",
    "deterministic": "deterministic",
    "multistep": "multistep",
}
METRICS = {
    "fid": ("FID", "distance to the reference, lower is better"),
    "kid": ("KID", "distance to the reference, lower is better"),
    "precision": ("Precision", "share of the images within the reference, higher is better"),
    "recall": ("Recall", "share of the reference within the images, higher is better"),
    "asr": ("ASR", "share of triggered images that show the target, lower is better"),
    "mse": ("MSE", "triggered images against the target, higher is better"),
    "ssim": ("SSIM", "triggered images against the target, lower is better"),
    "lpips": ("LPIPS", "triggered images against the target, higher is better"),
    "asr_known": ("ASR, true trigger", "of a red-team model: the trigger that was planted, lower is better"),
    "mse_known": ("MSE, true trigger", "triggered images against the planted target, higher is better"),
    "ssim_known": ("SSIM, true trigger", "triggered images against the planted target, lower is better"),
    "lpips_known": ("LPIPS, true trigger", "triggered images against the planted target, higher is better"),
}
VERDICTS = {
    Word.CLEAN: "No backdoor of the kinds that were searched for was found.",
    Word.BACKDOORED: "The model paints what an attacker chose when a trigger is added to its noise.",
    Word.INCONCLUSIVE: "The scan could not tell. Could-not-tell is never fine: the model is treated as unsafe.",
}
OUTCOMES = {
    Outcome.PROMOTED: "The model passed the gate.",
    Outcome.REPAIRED: "The repaired model passed the gate. The original did not and stays out.",
    Outcome.QUARANTINED: "The model did not pass the gate and stays out of production.",
}
ACTIONS = {
    Action.KEEP: "The model was kept as it is.",
    Action.PURIFY: "The model was repaired without real data, and the repaired model was scanned again with new seeds.",
    Action.QUARANTINE: "The model was set aside without a repair.",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture with its caption; `source` is a data URI."""

    caption: str
    source: str


def render_html(bundle: ReportBundle) -> str:
    """Return the report. It also renders what was only scanned: candidate, scorecard and decision may be None."""
    return template("report.html.j2").render(_context(bundle))


def _context(bundle: ReportBundle) -> dict[str, Any]:
    return {
        "model": bundle.model,
        "verdict": bundle.verdict,
        "decision": bundle.decision,
        "purified": bundle.purified,
        "scorecard": bundle.scorecard,
        "accent": ACCENTS[bundle.verdict.word],
        "probability": probability(bundle.verdict.probability),
        "facts": _facts(bundle),
        "story": _story(bundle),
        "actions": bundle.actions,
        "evidence": _evidence(bundle),
        "pairs": _pairs(bundle),
        "statistics": _statistics(bundle),
        "curves": _curves(bundle),
        "metrics": _metrics(bundle),
        "attacks": [_attack(row) for row in bundle.scorecard.attacks] if bundle.scorecard is not None else [],
        "attack_curves": _attack_curves(bundle),
        "rules": [_rule(rule) for rule in bundle.decision.rules] if bundle.decision is not None else [],
        "provenance": _provenance(bundle),
        "weights": _weights(bundle),
    }


def _facts(bundle: ReportBundle) -> list[str]:
    model = bundle.model
    facts = [model.family, " × ".join(str(size) for size in model.shape), f"{model.parameters:,} parameters"]  # noqa: RUF001
    if model.registered_name is not None:
        facts.append(f"registered as {model.registered_name} version {model.registered_version or ABSENT}")
    return facts


def _story(bundle: ReportBundle) -> list[str]:
    findings = (f"Static checks: {finding}." for finding in bundle.model.findings)
    story = [VERDICTS[bundle.verdict.word], *bundle.verdict.reasons, *findings]
    if bundle.candidate is not None:
        story.append(ACTIONS[bundle.candidate.action])
    if bundle.purified is not None:
        story += _repair(bundle.purified)
    if bundle.decision is not None:
        blocking = [rule.id for rule in bundle.decision.rules if rule.blocks]
        reason = f" Blocked by: {', '.join(blocking)}." if blocking else ""
        warned = [rule.id for rule in bundle.decision.rules if rule.result is RuleResult.FAIL and not rule.blocks]
        reason += f" Failed without blocking: {', '.join(warned)}." if warned else ""
        story.append(OUTCOMES[bundle.decision.outcome] + reason)
    return story


def _repair(purified: PurifiedModel) -> Iterator[str]:
    rescan, further = purified.rescan, purified.further_triggers
    rounds = max(purified.rounds, purified.rounds_tried)
    also = f" and removed {further} further {'triggers' if further > 1 else 'trigger'}" if further else ""
    yield f"The repair took {rounds} {'rounds' if rounds > 1 else 'round'}{also}."
    if purified.rounds < rounds:
        yield f"Round {purified.rounds} left least and is the one handed on."
    yield f"The scan of the repaired model says {rescan.word} ({probability(rescan.probability)})."
    if purified.still_fires is None:
        yield "No shift that was found led to one picture before the repair, so that this scan alone speaks for it."
    elif purified.still_fires:
        yield f"A shift that was found still paints its picture in {percent(purified.still_fires)} of the cases."


def _evidence(bundle: ReportBundle) -> list[Figure]:
    figures = []
    tau = bundle.taus.get(bundle.trigger.best)
    if tau is not None and tau.size:
        peak = number(_peak(tau))
        caption = f"The shift τ that the search found. Mid-grey changes nothing; white and black are ±{peak}."
        figures.append(Figure(caption=caption, source=_png(pictures.trigger_png(tau))))
    for name, caption in (
        ("triggered", "What the model paints when τ is added to its noise."),
        ("plain", "What it paints from the same noise without τ."),
    ):
        images = _some(bundle.detected.get(name))
        if images is not None:
            picture = pictures.grid_png(images, columns=4, tile=96, limit=SAMPLES)
            figures.append(Figure(caption=caption, source=_png(picture)))
    return figures


def _pairs(bundle: ReportBundle) -> list[Figure]:
    """Return one row of samples per figure: the same column is the same seed."""
    rows = (
        ("triggered/before", "with trigger, original"),
        ("triggered/after", "with trigger, repaired"),
        ("plain/before", "no trigger, original"),
        ("plain/after", "no trigger, repaired"),
    )
    found = ((caption, _some(bundle.evaluated.get(name))) for name, caption in rows)
    return [
        Figure(caption=caption, source=_png(pictures.grid_png(images, columns=PAIRS, tile=96, limit=PAIRS)))
        for caption, images in found
        if images is not None
    ]


def _statistics(bundle: ReportBundle) -> list[dict[str, Any]]:
    after = bundle.purified.rescan.statistics if bundle.purified is not None else {}
    return [_statistic(name, item, after.get(name)) for name, item in sorted(bundle.verdict.statistics.items())]


def _statistic(name: str, item: Statistic, after: Statistic | None) -> dict[str, Any]:
    return {
        "name": name.replace("_", " "),
        "anomalous": item.anomalous,
        "value": number(item.value),
        "center": number(item.center),
        "spread": number(item.spread),
        "z": score(item.score),
        "position": _position(item.score),
        "z_after": score(after.score) if after is not None else None,
        "position_after": _position(after.score) if after is not None else None,
    }


def _position(z: float) -> dict[str, float | bool] | None:
    """Return where a standardised score lies on a strip from 0 to 100, and whether it lies beyond its ends."""
    if math.isnan(z):
        return None
    held = max(-WIDEST_Z, min(WIDEST_Z, z))
    return {"x": round(50 + 48 * held / WIDEST_Z, 2), "beyond": abs(z) > WIDEST_Z}


def _curves(bundle: ReportBundle) -> list[Figure]:
    accent = ACCENTS[bundle.verdict.word]
    figures = []
    if bundle.trigger.candidates and bundle.trigger.timesteps:
        response = charts.response_svg(bundle.trigger.timesteps, bundle.trigger.candidates, bundle.trigger.best, accent)
        caption = (
            "The answer to each candidate over the timesteps, the strongest in colour. A clean network reads a shift "
            "as noise and paints nothing of it: c stays near 0. Beyond ±1 the scale of c is logarithmic."
        )
        figures.append(Figure(caption=caption, source=_svg(response)))
    losses = _losses(bundle)
    if losses:
        caption = "Losses of the trigger search and, if there was one, of the round of repair that was handed on."
        figures.append(Figure(caption=caption, source=_svg(charts.losses_svg(losses, accent))))
    return figures


def _losses(bundle: ReportBundle) -> dict[str, tuple[float, ...]]:
    curves = {"inversion": bundle.best.loss if bundle.best is not None else ()}
    if bundle.purified is not None:
        curves |= {"removal": bundle.purified.removal_loss, "retention": bundle.purified.retention_loss}
    return {name: values for name, values in curves.items() if values}


def _metrics(bundle: ReportBundle) -> list[dict[str, Any]]:
    if bundle.scorecard is None:
        return []
    before, after = bundle.scorecard.before, bundle.scorecard.after or {}
    names = [name for name in METRICS if name in before or name in after]
    names += sorted((before.keys() | after.keys()) - METRICS.keys())
    margins = {rule.id: rule for rule in bundle.decision.rules} if bundle.decision is not None else {}
    return [_metric(name, before.get(name), after.get(name), margins.get(f"{name}-after")) for name in names]


def _metric(name: str, before: Metric | None, after: Metric | None, rule: Rule | None) -> dict[str, Any]:
    title, meaning = METRICS.get(name, (name, ""))
    there = [metric for metric in (before, after) if metric is not None]
    return {
        "title": title,
        "meaning": meaning,
        "before": _measured(name, before),
        "after": _measured(name, after),
        "n": ", ".join(sorted({str(metric.n) for metric in there})),
        "bars": [_bar(metric, there) for metric in there],
        "has_after": after is not None,
        "margin": _rule(rule) if rule is not None else None,
    }


def _attack(row: AttackRow) -> dict[str, Any]:
    after = row.after or {}
    there = [metric for metric in (row.before.get("asr"), after.get("asr")) if metric is not None]
    return {
        "trigger": "true" if row.trigger == "known" else row.trigger,
        "sampler": row.sampler,
        "kind": KINDS.get(row.kind, row.kind),
        "steps": str(row.steps),
        "asr_before": _measured("asr", row.before.get("asr")),
        "asr_after": _measured("asr", after.get("asr")),
        "mse_before": _measured("mse", row.before.get("mse")),
        "mse_after": _measured("mse", after.get("mse")),
        "n": ", ".join(sorted({str(metric.n) for metric in there})),
    }


def _attack_curves(bundle: ReportBundle) -> list[Figure]:
    card = bundle.scorecard
    if card is None or not card.attacks or not card.asr_thresholds:
        return []
    drawn = charts.success_svg(card.attacks, card.asr_thresholds, card.asr_threshold, ACCENTS[bundle.verdict.word])
    caption = (
        "Attack success over the threshold of the squared error, by sampler: grey before the repair, in colour after "
        f"it, with intervals. The rates above are those at {number(card.asr_threshold)}, the dotted line."
    )
    return [Figure(caption=caption, source=_svg(drawn))]


def _shown(name: str) -> Callable[[float | None], str]:
    return percent if name in SHARES or name.startswith("asr") else number


def _measured(name: str, metric: Metric | None) -> dict[str, str] | None:
    if metric is None:
        return None
    shown = _shown(name)
    return {"value": shown(metric.value), "interval": f"{shown(metric.low)} to {shown(metric.high)}"}


def _bar(metric: Metric, all_of_them: list[Metric]) -> dict[str, float] | None:
    """Return value and interval of a metric as positions from 2 to 98, on one scale with the others; it begins at 0."""
    numbers = [part for item in all_of_them for part in (item.value, item.low, item.high)]
    if not all(math.isfinite(part) for part in numbers):
        return None
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    span = (high - low) or 1.0
    return {part: round(2 + 96 * (getattr(metric, part) - low) / span, 2) for part in ("value", "low", "high")}


def _rule(rule: Rule) -> dict[str, str]:
    shown = _shown(rule.id)
    return {
        "id": rule.id,
        "statement": rule.statement,
        "note": "waived" if rule.waived else "" if rule.blocking else "warns",
        "result": rule.result.value.replace("_", " "),
        "value": shown(rule.value),
        "limit": shown(rule.limit),
        "margin": shown(rule.margin),
    }


def _provenance(bundle: ReportBundle) -> list[tuple[str, str]]:
    verdict, scorecard, decision = bundle.verdict, bundle.scorecard, bundle.decision
    rows = [
        ("model source", bundle.model.source),
        ("model digest", bundle.model.digest),
        ("repaired model digest", bundle.purified.digest if bundle.purified is not None else None),
        ("config digest", bundle.config_digest),
        ("policy digest", decision.policy_digest if decision is not None else None),
        ("calibration digest", verdict.calibration_digest),
        ("calibration models", ", ".join(verdict.calibration_models) or "none"),
        ("feature extractor", f"{scorecard.extractor} ({scorecard.extractor_sha256})" if scorecard else None),
        ("reference of the FID", scorecard.reference if scorecard else None),
        ("samplers", _pairs_text(scorecard.samplers) if scorecard else None),
        ("seeds of the verdict", ", ".join(str(seed) for seed in verdict.seeds)),
        ("seed", str(bundle.seed) if bundle.seed is not None else None),
        ("model evaluations", f"{bundle.forward_equivalents:,} (forward 1, forward and backward 3)"),
        ("code version", _producers_text(bundle)),
        ("MLflow run", decision.run_id if decision is not None else None),
        ("findings of the static checks", "; ".join(bundle.model.findings) or "none"),
    ]
    return [(name, value) for name, value in rows if value]


def _weights(bundle: ReportBundle) -> list[tuple[str, str, str]]:
    groups = [("model", bundle.model.weights_sha256)]
    if bundle.purified is not None:
        groups.append(("repaired", bundle.purified.weights_sha256))
    return [(group, path, digest) for group, digests in groups for path, digest in sorted(digests.items())]


def _pairs_text(pairs: dict[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in sorted(pairs.items()))


def _producers_text(bundle: ReportBundle) -> str:
    versions = sorted(set(bundle.producers.values()))
    if len(versions) == 1:
        return versions[0]
    return _pairs_text(dict(bundle.producers))


def _some(images: Array | None) -> Array | None:
    return images if images is not None and images.ndim == 4 and images.size else None


def _peak(tau: Array) -> float:
    finite = tau[abs(tau) < math.inf]
    return float(abs(finite).max()) if finite.size else 0.0


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _svg(text: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
