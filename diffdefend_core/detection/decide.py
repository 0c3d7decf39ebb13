"""From standardised statistics to a word and a probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from diffdefend_core.artifacts import Statistic, Word

NEEDED = ("parity", "contrast", "violation", "content", "uniformity", "total_variation")
AMBIGUOUS = 0.75  # between this share of the limit and the limit itself: inconclusive


def score(statistics: Mapping[str, Statistic]) -> float:
    """Return the model's score, the largest of three; NaN if a statistic is missing, or its score is not finite.

    The violation of monotonicity stands alone. Parity or content count as far as they stand out from shifts that are
    no trigger. Uniform images count as far as something supports them: the published dual-modal rule asks that of the
    total variation; ours lets the network's answers do it as well, since a target with the texture of the data leaves
    the total variation as it is. The answers support twice their strength. The total variation supports half of it,
    because that of clean models of other data reaches 3.5.
    """
    if not all(name in statistics and math.isfinite(statistics[name].score) for name in NEEDED):
        return math.nan
    z = {name: statistics[name].score for name in NEEDED}
    even = max(z["parity"], z["content"])
    images = min(z["uniformity"], max(2 * even, 2 * z["violation"], z["total_variation"] / 2))
    return max(z["violation"], min(even, z["contrast"]), images)


def probability(model_score: float, limit: float) -> float:
    """Return the probability of a backdoor: a logistic curve that is 1/2 at the limit; 1/2 for an unknown score."""
    if not math.isfinite(model_score):
        return 0.5
    return 1 / (1 + math.exp(-max(-40.0, min(40.0, 2 * (model_score - limit)))))


def decide(
    statistics: Mapping[str, Statistic],
    *,
    limit: float,
    basis: str,
    covered: bool = True,
    score: Callable[[Mapping[str, Statistic]], float] = score,
) -> tuple[Word, float, tuple[str, ...]]:
    """Return word, probability and reasons; `basis` says what the statistics were standardised against.

    `covered` says whether those models speak of this one at all: if not, nothing can be called clean, and only a score
    of twice the limit is called backdoored.
    """
    model_score = score(statistics)
    chance = probability(model_score, limit)
    if not math.isfinite(model_score):
        return Word.INCONCLUSIVE, chance, ("a statistic is not finite: the model could not be measured",)
    said = f"score {model_score:.1f} against a limit of {limit:g} standard deviations of {basis}"
    anomalous = [name for name, item in statistics.items() if item.anomalous]
    named = "anomalous: " + ", ".join(anomalous) if anomalous else "no statistic is anomalous"
    if not covered:
        word = Word.BACKDOORED if model_score > 2 * limit else Word.INCONCLUSIVE
        return word, chance, (said, named, "no clean model speaks of this kind of model")
    if model_score > limit:
        return Word.BACKDOORED, chance, (said, named)
    if model_score > AMBIGUOUS * limit:
        return Word.INCONCLUSIVE, chance, (said, named, "too close to the limit to call")
    if anomalous:
        return Word.INCONCLUSIVE, chance, (said, named, "nothing supports the anomaly, nothing explains it")
    return Word.CLEAN, chance, (said, named)
