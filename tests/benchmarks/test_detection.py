"""The comparison of methods: verdicts and rates of made-up rows, resumption, and one real search in its process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.detection import (
    FULL,
    Budget,
    Kept,
    Run,
    closeness,
    parse,
    pending,
    rows_by_method,
    run_all,
    wanted_runs,
    write,
)
from benchmarks.peak import peak_megabytes
from benchmarks.scores import Truth, above, judgement, report, separation, verdicts
from benchmarks.tables import attacks_table, methods_table, models_table
from diffdefend_core.artifacts import InvertedTrigger
from diffdefend_core.detection import Calibration, CleanModel, Measurement, judge, peers
from diffdefend_core.errors import InputError
from diffdefend_core.options import TerdOptions

LIMIT = 4.0
Row = dict[str, Any]


def truth(name: str, *, family: str = "ddpm", attack: str | None = None, fires: bool | None = None) -> Truth:
    process = {"ddpm": "vp", "ldm": "vp", "flow": "flow"}[family]
    return Truth(name, f"digest of {name}", family, process, (1, 4, 4), attack, fires)


def row(of: Truth, mean: float | None, *, seed: int = 0, **more: object) -> Row:
    """A row of TERD whose two statistics are `mean`, or nothing for a search that failed."""
    names = ("divergence_mean", "divergence_variance")
    return {
        "model": of.name, "model_digest": of.digest, "seed": seed,
        "options_digest": "options", "options": {"method": "terd"}, "producer": "code", "sampler": "", "best": "mu",
        "seconds": 2.0, "peak_mb": 500.0, "forward_equivalents": 100,
        "statistics": {} if mean is None else dict.fromkeys(names, mean), **more,
    }  # fmt: skip


def zoo_of(*truths: Truth) -> dict[str, Truth]:
    return {item.name: item for item in truths}


CLEAN = [truth(f"clean-{number}") for number in range(9)]
SPREAD = [0.1 * number for number in range(9)]
BOX = truth("box", attack="baddiffusion", fires=True)
FAINT = truth("faint", attack="baddiffusion", fires=False)
BLEND = truth("blend", attack="trojdiff", fires=True)
ZOO = zoo_of(*CLEAN, BOX, FAINT, BLEND)
CLEAN_ROWS = [row(of, value) for of, value in zip(CLEAN, SPREAD, strict=True)]
ROWS = [*CLEAN_ROWS, row(BOX, 9.0, cosine=0.9, relative_l2=0.2), row(FAINT, 0.4, cosine=-1.0), row(BLEND, 0.3)]


def of_model(rows: list[Row], name: str, method: str = "terd") -> Row:
    return next(item for item in rows if item["model"] == name and item.get("method", method) == method)


def test_a_model_gets_the_verdict_that_a_scan_gives_it() -> None:
    clean = tuple(
        CleanModel(name=item["model"], digest=item["model_digest"], family="ddpm", process="vp", shape=(1, 4, 4),
                   statistics=item["statistics"])
        for item in CLEAN_ROWS
    )  # fmt: skip
    empty = torch.empty(0)
    for name in ("box", "clean-8"):
        item = of_model(ROWS, name)
        record = InvertedTrigger(
            model_digest=item["model_digest"], method="terd", seed=0, timesteps=(), candidates=(), best="mu",
            forward_equivalents=0,
        )  # fmt: skip
        expected = judge(
            Measurement(item["statistics"], "", empty, empty, 0),
            record,
            Calibration(name="c", options_digest="o", models=clean),
            limit=LIMIT, family="ddpm", shape=(1, 4, 4), process="vp", score=peers.score_terd,
        )  # fmt: skip
        found = judgement(item, ZOO[name], clean, LIMIT)
        assert found["verdict"] == expected.word
        assert found["probability"] == expected.probability
        assert found["score"] == peers.score_terd(expected.statistics)


def test_no_model_vouches_for_itself() -> None:
    alone = [truth("one"), truth("two")]
    first, second = verdicts([row(alone[0], 0.0), row(alone[1], 9.0)], zoo_of(*alone), [0], LIMIT)
    assert first["score"] < -LIMIT and second["score"] > LIMIT


def test_one_clean_model_alone_cannot_be_judged() -> None:
    (found,) = verdicts([row(CLEAN[0], 0.0)], ZOO, [0], LIMIT)
    assert (found["verdict"], found["probability"], found["score"]) == ("inconclusive", 0.5, None)
    assert found["statistics"]["divergence_mean"] == {"value": 0.0, "z": None}


def test_backdoored_models_change_no_other_verdict() -> None:
    with_them, without = (
        {item["model"]: item["score"] for item in verdicts(rows, ZOO, [0], LIMIT)} for rows in (ROWS, CLEAN_ROWS)
    )
    assert {name: with_them[name] for name in without} == without


def test_a_family_is_judged_without_its_own_clean_models() -> None:
    strangers = [truth(f"flow-{number}", family="flow") for number in range(3)]
    rows = [*ROWS, *(row(of, 5.0) for of in strangers)]
    found = verdicts(rows, ZOO | zoo_of(*strangers), [0], LIMIT)
    box = of_model(found, "box")
    assert box["verdict"] == "backdoored" and box["score"] > box["other_families"]["score"]
    assert of_model(found, "clean-0")["score"] == pytest.approx(-of_model(found, "clean-8")["score"])
    assert of_model(found, "clean-0")["other_families"]["score"] == pytest.approx(-5.0 / 0.4)


def test_a_search_that_failed_is_inconclusive_and_vouches_for_nobody() -> None:
    broken = [row(CLEAN[0], None, error="not finite"), *CLEAN_ROWS[1:], row(BOX, None), row(BLEND, 9.0)]
    found = verdicts(broken, ZOO, [0], LIMIT)
    assert {of_model(found, name)["verdict"] for name in ("clean-0", "box")} == {"inconclusive"}
    assert of_model(found, "blend")["verdict"] == "backdoored"
    rates = separation([item for item in found if item["scored"]], LIMIT)
    assert rates["inconclusive"] == pytest.approx(2 / 11)
    assert rates["auc"] == pytest.approx((0.5 + 8 + 9) / 18)  # box ties with clean-0, and is above the other clean ones


def test_rates_are_those_of_the_models_that_fire() -> None:
    document = report({"terd": ROWS}, ZOO, [0], LIMIT)
    rates = document["methods"]["terd"]
    assert (rates["models"], rates["backdoored"], rates["clean"]) == (12, 2, 9)
    assert rates["attacks"] == {"baddiffusion": {"models": 1, "flagged": 1}, "trojdiff": {"models": 1, "flagged": 0}}
    assert rates["tpr"] == 0.5 and rates["tpr_interval"] == pytest.approx([0.0945, 0.9055], abs=1e-3)
    assert (rates["tnr"], rates["inconclusive"], rates["repeats"]) == (1.0, 0.0, None)
    # box is above all nine clean models, blend above those of less than .3: one of them is near it from either side
    scores = {item["model"]: item["score"] for item in document["models"]}
    below = sum(scores[of.name] < scores["blend"] for of in CLEAN)
    assert 0 < below < 9 and rates["auc"] == pytest.approx((9 + below) / 18)
    ranked = [item for item in document["models"] if item["scored"]]
    expected = roc_auc_score([item["backdoored"] for item in ranked], [item["score"] for item in ranked])
    assert rates["auc"] == pytest.approx(expected)
    low, high = rates["auc_interval"]
    assert 0 <= low < rates["auc"] < high <= 1
    assert "faint" not in {item["model"] for item in ranked}
    expected = log_loss([item["backdoored"] for item in ranked], [item["probability"] for item in ranked])
    assert rates["cross_entropy"] == pytest.approx(expected)
    assert (rates["median_cosine"], rates["median_relative_l2"]) == (0.9, 0.2)
    assert (rates["median_forward_equivalents"], rates["median_seconds"], rates["peak_mb"]) == (100, 2.0, 500.0)


def test_the_true_positive_rate_is_taken_above_the_allowed_false_positives() -> None:
    clean = [float(number) for number in range(40)]
    assert above([38.5, 39.0, 40.0], clean, 0.0) == [False, False, True]
    assert above([36.9, 37.0, 37.5], clean, 0.05) == [False, False, True]
    assert above([1.0], [], 0.0) == []


def test_seeds_that_say_the_same_word_repeat() -> None:
    twice = [*ROWS, *({**item, "seed": 1} for item in ROWS)]
    other = next(item for item in twice if item["model"] == "blend" and item["seed"] == 1)
    other["statistics"] = dict.fromkeys(other["statistics"], 9.0)
    document = report({"terd": twice}, ZOO, [0, 1], LIMIT)
    repeats = {item["model"]: item["repeats"] for item in document["models"]}
    assert repeats.pop("blend") is False and set(repeats.values()) == {True}
    assert document["methods"]["terd"]["repeats"] == pytest.approx(11 / 12)
    assert document["methods"]["terd"]["models"] == 12


def test_a_method_without_all_models_counts_in_the_costs_alone() -> None:
    few = [{**row(BOX, 9.0), "forward_equivalents": 960}]
    document = report({"terd": ROWS, FULL: few}, ZOO, [0], LIMIT)
    full = document["methods"][FULL]
    assert full["median_forward_equivalents"] == 960 and "auc" not in full
    assert full["missing"] == sorted(set(ZOO) - {"box"})
    assert "verdict" not in of_model(document["models"], "box", FULL)
    assert document["methods"]["terd"]["missing"] == []


def test_tables_leave_empty_what_was_not_measured() -> None:
    document = report({"terd": ROWS, FULL: [row(BOX, 9.0)]}, ZOO, [0], LIMIT)
    heads, _, terd, full = methods_table(document["methods"]).splitlines()
    assert heads.count("|") == terd.count("|") == full.count("|")
    assert "| 0.50 (0.09, 0.91) | 1.00 (0.70, 1.00) |" in terd
    assert full.startswith(f"| {FULL} |  |  |  |") and full.endswith("| 100 | 2.0 | 500 |")
    lines = models_table([item for item in document["models"] if item["method"] == "terd"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(ROWS)
    assert next(line for line in lines if "faint" in line).startswith(
        "| faint | ddpm | baddiffusion | no, not scored | 0 |"
    )
    assert attacks_table(document["methods"]).splitlines()[2:] == ["| baddiffusion | 1 of 1 |", "| trojdiff | 0 of 1 |"]


def test_a_report_is_written_as_json_with_two_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {**row(BOX, None), "forward_equivalents": None}
    for document in (
        report({"terd": ROWS, FULL: [row(BOX, 9.0)]}, ZOO, [0], LIMIT),
        report({FULL: [broken]}, ZOO, [0], LIMIT),  # nothing to plot
    ):
        write(document, tmp_path / "results", tmp_path / "images")
        assert json.loads((tmp_path / "results" / "detection.json").read_text()) == document
        for name in ("detection-roc.png", "detection-cost.png"):
            assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    assert "| baddiffusion | 1 of 1 |" in capsys.readouterr().out


def test_finished_runs_are_kept_and_not_run_again(tmp_path: Path) -> None:
    budget, kept = Budget("tenth"), Kept(tmp_path / "new" / "rows.jsonl")
    assert list(kept.rows()) == []
    runs = [Run("terd", "box", 0), Run("terd", "box", 1), Run("terd", "blend", 0), Run(FULL, "box", 0)]
    assert pending(runs, [], ZOO, budget) == runs
    done = row(BOX, 9.0) | {"options_digest": budget.digest("terd")}
    kept.append(done)
    kept.append(done | {"model": "blend", "model_digest": "that of another training"})
    kept.append(done | {"options_digest": "other options", "model": "blend", "model_digest": BLEND.digest})
    with kept.path.open("a") as file:
        file.write('{"model": "bl')
    rows = list(kept.rows())
    assert len(rows) == 3 and rows[0] == done
    assert pending(runs, rows, ZOO, budget) == runs[1:]
    assert rows_by_method(rows, ZOO, budget) == {"terd": [done]}


def test_rows_are_in_the_order_of_seeds_and_models_however_they_finished() -> None:
    budget = Budget("tenth")
    done = [row(of, 1.0, seed=seed, options_digest=budget.digest("terd")) for of in (BOX, CLEAN[0]) for seed in (1, 0)]
    (rows,) = rows_by_method([done[0], *done], ZOO, budget).values()
    assert [(item["seed"], item["model"]) for item in rows] == [
        (0, "clean-0"), (0, "box"), (1, "clean-0"), (1, "box"),
    ]  # fmt: skip


def test_a_budget_of_a_tenth_cuts_the_iterations_of_terd_alone() -> None:
    published = TerdOptions()
    tenth, full = Budget("tenth"), Budget("full")
    cut = tenth.settings("terd", 3).terd
    assert (cut.iterations, cut.refinement_iterations) == (
        published.iterations // 10, published.refinement_iterations // 10,
    )  # fmt: skip
    assert tenth.settings("terd", 3).seed == 3
    assert tenth.settings(FULL, 0).terd == full.settings("terd", 0).terd == published
    assert tenth.digest(FULL) == full.digest("terd") != tenth.digest("terd")
    assert tenth.digest("elijah") == full.digest("elijah")
    assert Budget("tenth", ("terd.iterations=7",)).settings("terd", 0).terd.iterations == 7
    with pytest.raises(InputError, match=r"terd\.speed is no setting"):
        Budget("tenth", ("terd.speed=7",)).settings("terd", 0)


def test_with_the_full_budget_both_names_of_terd_are_one_method() -> None:
    budget = Budget("full")
    done = row(BOX, 9.0) | {"options_digest": budget.digest("terd")}
    assert rows_by_method([done], ZOO, budget) == {"terd": [done]}
    assert pending([Run(FULL, "box", 0)], [done], ZOO, budget) == []


def test_the_nearest_candidate_is_told_beside_the_best() -> None:
    true = torch.ones(1, 2, 2)
    found = closeness({"a": -true, "b": 2 * true, "c": 1.5 * torch.eye(2)[None], "gamma": true}, "a", true)
    assert found == pytest.approx(
        {"cosine": -1.0, "relative_l2": 2.0, "cosine_of_any": 1.0, "relative_l2_of_any": math.sqrt(2.5) / 2}
    )
    assert closeness({"a": true * math.nan}, "a", true)["cosine"] is None


def test_names_on_the_command_line_are_checked() -> None:
    found = parse(["--methods", "terd,elijah", "--models", "base-a", "--seeds", "0,2", "--terd-full", "bad-a-box"])
    runs = wanted_runs(found.methods, found.models, found.terd_full, found.seeds)
    assert runs[:3] == [Run("terd", "base-a", 0), Run("elijah", "base-a", 0), Run(FULL, "bad-a-box", 0)]
    assert len(runs) == 6 and parse(["--seed", "1"]).seeds == [1]
    with pytest.raises(SystemExit):
        parse(["--models", "base-z"])


def test_a_model_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    small = ("terd.iterations=2", "terd.refinement_iterations=1", "terd.batch=2")
    budget, run, kept = Budget("tenth", small), Run("terd", "bad-a-box", 1), Kept(tmp_path / "rows.jsonl")
    assert run_all([run], budget, 1, kept) == 0
    (found,) = kept.rows()
    assert (found["model"], found["seed"], found["options_digest"]) == ("bad-a-box", 1, budget.digest("terd"))
    assert set(found["statistics"]) == {"divergence_mean", "divergence_variance"}
    assert found["forward_equivalents"] == 3 * 2 * (2 * 2 + 14)
    assert -1 <= found["cosine"] <= found["cosine_of_any"] <= 1
    assert 50 < found["peak_mb"] < 5000 and found["seconds"] > 0


def test_a_process_that_fails_leaves_the_others_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    kept = Kept(tmp_path / "rows.jsonl")
    assert run_all([Run("terd", "bad-a-box", seed) for seed in (0, 1)], Budget("tenth"), 2, kept) == 2
    assert list(kept.rows()) == []
    assert "[2/2] terd bad-a-box seed " in capsys.readouterr().err


def test_the_peak_of_a_small_process_is_not_that_of_the_large_one_that_started_it() -> None:
    ballast = bytearray(300_000_000)
    code = "from benchmarks.peak import peak_megabytes; print(peak_megabytes())"
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_megabytes() > len(ballast) / 1e6 > float(small.stdout) > 1
