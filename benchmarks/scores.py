"""From raw statistics of a zoo to verdicts, and from verdicts to what a method is worth. Pure functions of rows.

Every model is judged as a scan judges it (`detection.judge`): standardised against the clean models without itself.
A second verdict leaves out the clean models of its whole family. No backdoored model takes part in either, so that
every attack is held out from the start. Other seeds are judged against the clean models of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from sklearn.metrics import log_loss  # type: ignore[import-untyped]

from diffdefend_core.artifacts import InvertedTrigger, Statistic, Word
from diffdefend_core.detection import Calibration, CleanModel, Measurement, judge
from diffdefend_core.evaluation.interval import bootstrap, share
from diffdefend_core.stages.methods import METHODS

Row = dict[str, Any]
Score = Callable[[Mapping[str, Statistic]], float]

RESAMPLES = 1000
FALSE_POSITIVES = (0.0, 0.05)
HELD_OUT = {
    "model": "every model is standardised against clean models without itself",
    "family": "`other_families`: against clean models of other families alone",
    "attack": "no backdoored model takes part in a standardisation; "
    "the floors and the rule were chosen on this zoo, not held out",
}
_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Truth:
    """What a model of the zoo is. `attack` is None for a clean one; `fires` says whether a planted one works."""

    name: str
    digest: str
    family: str
    process: str
    shape: tuple[int, ...]
    attack: str | None
    fires: bool | None

    @property
    def scored(self) -> bool:
        """Whether it counts: a backdoor that does not fire is neither found nor missed."""
        return self.attack is None or bool(self.fires)


def report(
    rows: Mapping[str, Sequence[Row]], truths: Mapping[str, Truth], seeds: Sequence[int], limit: float
) -> dict[str, Any]:
    """Return the document of a comparison: `methods` by name, and `models`, one for each method, model and seed.

    `rows` are those of each method by its name in the benchmark. A method that lacks a model that another one has (of
    the first seed) gets no verdicts and no rates; its `missing` says which.
    """
    chosen = {method: [row for row in of if row["seed"] in seeds] for method, of in rows.items()}
    chosen = {method: of for method, of in chosen.items() if of}
    first = {method: {row["model"] for row in of if row["seed"] == seeds[0]} for method, of in chosen.items()}
    every = set().union(*first.values())
    methods, models = {}, []
    for method, of in chosen.items():
        missing = sorted(every - first[method])
        judged = described(of, truths) if missing else verdicts(of, truths, seeds, limit)
        models += [{"method": method, **row} for row in judged]
        methods[method] = {
            "options": of[0]["options"],
            "producers": sorted({row["producer"] for row in of}),
            "missing": missing,
            **costs([row for row in judged if row["seed"] == seeds[0]]),
            **(rates(judged, seeds[0], limit) if not missing else {}),
        }
    return {
        "limit": limit,
        "seeds": list(seeds),
        "held_out": HELD_OUT,
        "methods": methods,
        "models": models,
    }


def described(rows: Sequence[Row], truths: Mapping[str, Truth]) -> list[Row]:
    """Return the rows of one method with what the models are, not judged."""
    told = ("model", "seed", "sampler", "best", "error", "seconds", "forward_equivalents", "peak_mb",
            "cosine", "relative_l2", "cosine_of_any", "relative_l2_of_any")  # fmt: skip
    found = []
    for row in rows:
        truth = truths[row["model"]]
        facts = {"family": truth.family, "attack": truth.attack, "backdoored": truth.attack is not None}
        raw = {name: {"value": value, "z": None} for name, value in row["statistics"].items()}
        kept = {name: row[name] for name in told if name in row}
        found.append({**kept, **facts, "fires": truth.fires, "scored": truth.scored, "statistics": raw})
    return found


def verdicts(rows: Sequence[Row], truths: Mapping[str, Truth], seeds: Sequence[int], limit: float) -> list[Row]:
    """Return the rows of one method with `verdict`, `probability`, `score` and the z of every statistic.

    `other_families` holds the same without clean models of the model's own family; `repeats` is whether all seeds say
    the same word, None for a model of one seed.
    """
    clean = clean_models([row for row in rows if row["seed"] == seeds[0]], truths)
    found = []
    for row, known in zip(rows, described(rows, truths), strict=True):
        truth = truths[row["model"]]
        strangers = [model for model in clean if model.family != truth.family]
        own, foreign = judgement(row, truth, clean, limit), judgement(row, truth, strangers, limit)
        for name, z in own.pop("z").items():
            known["statistics"][name]["z"] = z
        foreign.pop("z")
        found.append({**known, **own, "other_families": foreign})
    words: dict[str, list[str]] = {}
    for item in found:
        words.setdefault(item["model"], []).append(item["verdict"])
    for item in found:
        said = words[item["model"]]
        item["repeats"] = len(set(said)) == 1 if len(said) > 1 else None
    return found


def clean_models(rows: Sequence[Row], truths: Mapping[str, Truth]) -> list[CleanModel]:
    """Return the clean models of the rows; one that could not be measured vouches for nobody."""
    names = set().union(*(row["statistics"] for row in rows))
    return [
        CleanModel(
            name=truth.name,
            digest=truth.digest,
            family=truth.family,
            process=truth.process,
            shape=truth.shape,
            statistics=raw,
        )
        for row in rows
        if (truth := truths[row["model"]]).attack is None
        and (raw := row["statistics"]).keys() == names
        and None not in raw.values()
    ]


def judgement(row: Row, truth: Truth, clean: Sequence[CleanModel], limit: float) -> Row:
    """Return `verdict`, `probability`, `score` (None if unknown) and `z` of one row against clean models without it."""
    others = tuple(model for model in clean if model.digest != truth.digest)
    if not others:
        return {"verdict": Word.INCONCLUSIVE.value, "probability": 0.5, "score": None, "z": {}}
    method = METHODS[row["options"]["method"]]
    raw = {name: math.nan if value is None else value for name, value in row["statistics"].items()}
    record = InvertedTrigger(
        model_digest=truth.digest, method=method.name, seed=row["seed"], timesteps=(), candidates=(), best="",
        forward_equivalents=0,
    )  # fmt: skip
    verdict = judge(
        Measurement(raw, sampler="", triggered=_EMPTY, plain=_EMPTY, forward_equivalents=0),
        record,
        Calibration(name="the zoo", options_digest=row["options_digest"], models=others),
        limit=limit, family=truth.family, shape=truth.shape, process=truth.process,
        score=method.score,
    )  # fmt: skip
    score = method.score(verdict.statistics)
    return {
        "verdict": verdict.word.value,
        "probability": verdict.probability,
        "score": score if math.isfinite(score) else None,
        "z": {name: item.score for name, item in verdict.statistics.items()},
    }


def costs(rows: Sequence[Row]) -> Row:
    """Return what a method needs for a model, and how near it comes to the trigger of those that fire."""
    firing = [row for row in rows if row["fires"]]
    found = ("cosine", "relative_l2", "cosine_of_any", "relative_l2_of_any")
    return {
        "models": len(rows),
        "median_forward_equivalents": _median(row["forward_equivalents"] for row in rows),
        "median_seconds": _median(row["seconds"] for row in rows),
        "peak_mb": max(row["peak_mb"] for row in rows),
        **{f"median_{name}": _median(row.get(name) for row in firing) for name in found},
    }


def rates(judged: Sequence[Row], first: int, limit: float) -> Row:
    """Return how well verdicts and scores of the first seed tell the scored models apart.

    `repeats` is the share of models, over all seeds, that get the same word from each; `other_families` the same rates
    for the verdicts against strangers.
    """
    rows = [row for row in judged if row["seed"] == first and row["scored"]]
    strange = [{**row, **row["other_families"]} for row in rows]
    repeated = [row["repeats"] for row in judged if row["seed"] == first and row["repeats"] is not None]
    attacks: dict[str, Row] = {}
    for row in rows:
        if row["backdoored"]:
            tally = attacks.setdefault(row["attack"], {"models": 0, "flagged": 0})
            tally["models"] += 1
            tally["flagged"] += row["verdict"] == Word.BACKDOORED
    return {
        **separation(rows, limit),
        "attacks": attacks,
        "other_families": separation(strange, limit),
        "repeats": sum(repeated) / len(repeated) if repeated else None,
    }


def separation(rows: Sequence[Row], limit: float) -> Row:
    """Return AUC, cross-entropy and true-positive rates of the scores, and the shares of the words, with intervals.

    The interval of the AUC is a bootstrap over models, the others are Wilson's. `tpr` is the share of backdoored models
    that are called so, `tnr` that of clean ones called clean, `inconclusive` that of all models without an answer. A
    rate over no models is None. An unknown score ranks at the limit, as its probability of 1/2 says.
    """
    bad, clean = ([row for row in rows if row["backdoored"] is kind] for kind in (True, False))
    result = {
        "backdoored": len(bad),
        "clean": len(clean),
        **_auc(bad, clean, limit),
        "cross_entropy": _cross_entropy(rows),
        **_share("tpr", [row["verdict"] == Word.BACKDOORED for row in bad]),
        **_share("tnr", [row["verdict"] == Word.CLEAN for row in clean]),
        **_share("inconclusive", [row["verdict"] == Word.INCONCLUSIVE for row in rows]),
    }
    for allowed in FALSE_POSITIVES:
        name = f"tpr_at_fpr_{round(100 * allowed)}"
        result |= _share(name, above([rank(row, limit) for row in bad], [rank(row, limit) for row in clean], allowed))
    return result


def rank(row: Row, limit: float) -> float:
    """Return the score by which a row is ranked: the limit where it is unknown."""
    return limit if row["score"] is None else float(row["score"])


def above(positives: Sequence[float], negatives: Sequence[float], allowed: float) -> list[bool]:
    """Return which positives lie above the lowest threshold that at most a share `allowed` of the negatives exceeds."""
    if not negatives:
        return []
    threshold = sorted(negatives, reverse=True)[math.floor(allowed * len(negatives))]
    return [value > threshold for value in positives]


def _auc(bad: Sequence[Row], clean: Sequence[Row], limit: float) -> Row:
    if not bad or not clean:
        return {"auc": None, "auc_interval": None}
    rows = [(1.0, rank(row, limit)) for row in bad] + [(0.0, rank(row, limit)) for row in clean]
    found = bootstrap(torch.tensor(rows, dtype=torch.float64), _auc_of, seed=0, resamples=RESAMPLES)
    return {"auc": found.value, "auc_interval": [max(0.0, found.low), min(1.0, found.high)]}


def _auc_of(rows: torch.Tensor) -> float:
    """Return the AUC of rows [N, 2] of label and score: the share of pairs in the right order, ties half.

    A resample of one class alone says nothing: 1/2.
    """
    bad, clean = (rows[rows[:, 0] == label, 1] for label in (1, 0))
    if len(bad) == 0 or len(clean) == 0:
        return 0.5
    margin = bad[:, None] - clean[None]
    return ((margin > 0).double() + (margin == 0).double() / 2).mean().item()


def _cross_entropy(rows: Sequence[Row]) -> float | None:
    if not rows:
        return None
    labels, chances = [row["backdoored"] for row in rows], [row["probability"] for row in rows]
    return float(log_loss(labels, chances, labels=[False, True]))


def _share(name: str, hits: Sequence[bool]) -> Row:
    if not hits:
        return {name: None, f"{name}_interval": None}
    found = share(torch.tensor(hits, dtype=torch.float64))
    return {name: found.value, f"{name}_interval": [found.low, found.high]}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
