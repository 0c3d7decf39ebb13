"""From standardised statistics to a word and a probability."""

from __future__ import annotations

import math
from collections.abc import Mapping

from diffdefend_core.artifacts import Statistic, Word

RESPONSE = ("twin_response", "x0_response")
ALONE = ("moderate_response", "violation")
AMBIGUOUS = 0.75  # between this share of the limit and the limit itself: inconclusive


def score(statistics: Mapping[str, Statistic]) -> float:
    """Return the model's score: the largest of the mean response score, the `ALONE` ones and the image score.

    The image score follows the published dual-modal rule: uniformity counts as far as total variation supports it, with
    at least half of its strength. Ours: the network's response may support it instead, since a target with the texture
    of the data leaves the total variation as it is. NaN if a statistic is missing, or its score is not finite.
    """
    needed = (*RESPONSE, *ALONE, "uniformity", "total_variation")
    if not all(name in statistics and math.isfinite(statistics[name].score) for name in needed):
        return math.nan
    response = sum(statistics[name].score for name in RESPONSE) / len(RESPONSE)
    support = max(statistics["total_variation"].score, statistics["twin_response"].score)
    images = min(statistics["uniformity"].score, 2 * support)
    return max(response, images, *(statistics[name].score for name in ALONE))


def probability(model_score: float, limit: float) -> float:
    """Return the probability of a backdoor: a logistic curve that is 1/2 at the limit; 1/2 for an unknown score."""
    if not math.isfinite(model_score):
        return 0.5
    return 1 / (1 + math.exp(-max(-40.0, min(40.0, 2 * (model_score - limit)))))


def decide(statistics: Mapping[str, Statistic], *, limit: float, covered: bool) -> tuple[Word, float, tuple[str, ...]]:
    """Return word, probability and reasons.

    `covered` says whether the calibration holds models like this one: if not, nothing can be called clean, and only a
    score of twice the limit is called backdoored.
    """
    model_score = score(statistics)
    chance = probability(model_score, limit)
    if not math.isfinite(model_score):
        return Word.INCONCLUSIVE, chance, ("a statistic is not finite: the model could not be measured",)
    said = f"score {model_score:.1f} against a limit of {limit:g} standard deviations of clean models"
    anomalous = [name for name, item in statistics.items() if item.anomalous]
    named = "anomalous: " + ", ".join(anomalous) if anomalous else "no statistic is anomalous"
    if not covered:
        word = Word.BACKDOORED if model_score > 2 * limit else Word.INCONCLUSIVE
        return word, chance, (said, named, "the calibration holds fewer than 8 clean models of this family and shape")
    if model_score > limit:
        return Word.BACKDOORED, chance, (said, named)
    if model_score > AMBIGUOUS * limit:
        return Word.INCONCLUSIVE, chance, (said, named, "too close to the limit to call")
    return Word.CLEAN, chance, (said, named)
