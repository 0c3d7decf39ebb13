"""The HTML report is one file that stands alone, tells every outcome, and lets nothing from outside act in it."""

from __future__ import annotations

import dataclasses
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import sample_records as sample

from diffdefend_core.artifacts import Action, Outcome, Word
from diffdefend_core.gate import rules
from diffdefend_core.gate.policy import shipped_policy
from diffdefend_core.report import charts
from diffdefend_core.report.bundle import ReportBundle
from diffdefend_core.report.html import ACCENTS, render_html

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CASES = {
    Outcome.PROMOTED: (Word.CLEAN, Action.KEEP, 0.0),
    Outcome.REPAIRED: (Word.BACKDOORED, Action.PURIFY, 0.0),
    Outcome.QUARANTINED: (Word.BACKDOORED, Action.PURIFY, 0.11),
}
HOSTILE = "<script>alert(1)</script>\"' onload=x $\\frac{1}$ \u202e{{ 7 * 7 }}"


def bundle(
    word: Word = Word.CLEAN, action: Action = Action.KEEP, asr_after: float = 0.0, **changes: Any
) -> ReportBundle:
    found = word is Word.BACKDOORED
    verdict, candidate = sample.verdict(word), sample.candidate(action)
    card = sample.scorecard(action is Action.PURIFY, found, asr_after)
    given: dict[str, Any] = {
        "model": sample.model_ref(),
        "trigger": sample.trigger(found),
        "verdict": verdict,
        "candidate": candidate,
        "scorecard": card,
        "decision": rules.decide(verdict, candidate, card, shipped_policy(), model_name="digits-16", now=NOW),
        "actions": ("The alias @champion points at version 4.",),
        "seed": 0,
        "config_digest": "7" * 64,
        "producers": {"load": "0.1.0+abc", "detect": "0.1.0+abc"},
        "taus": {"parity": sample.tau()},
        "detected": sample.detected(found),
        "evaluated": sample.evaluated(action is Action.PURIFY),
    }
    return ReportBundle(**{**given, **changes})


REPAIRS = {
    "The repair took 1 round.": {},
    "The repair took 3 rounds and removed 1 further trigger.": {"rounds": 3, "further_triggers": 1},
    "and removed 2 further triggers.": {"further_triggers": 2},
    "Round 2 left least and is the one handed on.": {"rounds": 2, "rounds_tried": 3},
    "A shift that was found still paints its picture in 3.1 % of the cases.": {"still_fires": 1 / 32},
    "so that this scan alone speaks for it.": {"still_fires": None},
}


class Page(HTMLParser):
    """Collects tags, attributes and text of a page, and checks that what opens also closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("outcome", list(CASES))
def test_every_outcome_renders_with_its_verdict_and_its_accent(outcome: Outcome) -> None:
    word, action, asr_after = CASES[outcome]
    html = render_html(bundle(word, action, asr_after))
    page = Page(html)
    assert page.open == []
    assert f"Gate: {outcome.value}." in page.text
    assert f"--accent: {ACCENTS[word]}" in html
    assert not any(f"--accent: {accent}" in html for other, accent in ACCENTS.items() if other is not word)
    assert ("Before and after the repair" in page.text) == (action is Action.PURIFY)
    assert ("Blocked by: asr-after" in page.text) == (outcome is Outcome.QUARANTINED)


def test_an_inconclusive_scan_renders_too() -> None:
    page = Page(render_html(bundle(Word.INCONCLUSIVE, Action.QUARANTINE)))
    assert "Could-not-tell is never fine" in page.text
    assert "Blocked by: verdict-clean" in page.text


def test_the_page_stands_alone() -> None:
    html = render_html(bundle(Word.BACKDOORED, Action.PURIFY))
    page = Page(html)
    assert not re.search(r"https?://", html)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in {"src", "href", "srcset", "xlink:href"}]
    assert len(sources) == 10
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in sources)
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_what_it_does_not_prove_is_said_by_name() -> None:
    text = Page(render_html(bundle())).text
    for name in ("Text triggers are not covered", "Gungnir", "Image-to-image is not covered"):
        assert name in text


def test_hostile_names_stay_text() -> None:
    trigger = sample.trigger()
    renamed = dataclasses.replace(trigger.candidates[0], name=HOSTILE)
    verdict = sample.verdict(Word.BACKDOORED, reasons=(HOSTILE,), statistics={HOSTILE: sample.statistic(1, 0, 1)})
    html = render_html(
        bundle(
            Word.BACKDOORED,
            Action.PURIFY,
            model=sample.model_ref(HOSTILE, source=HOSTILE, findings=(HOSTILE,)),
            trigger=dataclasses.replace(trigger, candidates=(renamed, *trigger.candidates[1:]), best=HOSTILE),
            verdict=verdict,
            taus={HOSTILE: sample.tau()},
            actions=(HOSTILE,),
        )
    )
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in html


def test_the_numbers_are_there() -> None:
    text = Page(render_html(bundle(Word.BACKDOORED, Action.PURIFY, 0.01))).text
    for shown in ("> 99.9 %", "+39.1", "98.0 %", "1.0 %", "6.4", "5.9 to 6.9", "7" * 64, "c" * 64, "349,200"):
        assert shown in text


def test_every_sampler_has_its_row_and_its_curve() -> None:
    page = Page(render_html(bundle(Word.BACKDOORED, Action.PURIFY, 0.01)))
    assert "Attack success by sampler" in page.text
    for shown in ("DDPM-SCHED", "DDIM-SCHED", "UNIPC", "the one that it fires with", "44.0 %", "31.0 %"):
        assert shown in page.text
    assert "Attack success by sampler" not in Page(render_html(bundle())).text


def test_the_curve_is_drawn_once_per_sampler_and_side() -> None:
    rows = sample.attacks(True, 0.01)
    both = charts.success_svg(rows, sample.THRESHOLDS, 0.05, "#a61b29")
    one = charts.success_svg(sample.attacks(False, 0.0), sample.THRESHOLDS, 0.05, "#a61b29")
    assert both.count("stroke: #a61b29") > one.count("stroke: #a61b29") == 0
    # a curve that does not fit the thresholds is left out, not drawn wrongly
    assert "stroke: #a61b29" not in charts.success_svg(rows, (0.1, 0.2), 0.05, "#a61b29")


def test_it_never_shows_certainty() -> None:
    for probability, shown in ((1.0, "> 99.9 %"), (0.0, "< 0.1 %")):
        page = Page(render_html(bundle(verdict=sample.verdict(probability=probability))))
        assert shown in page.text


def test_a_scan_alone_renders() -> None:
    page = Page(render_html(bundle(candidate=None, scorecard=None, decision=None, actions=(), evaluated={})))
    assert "scan report" in page.text
    assert "Rules of the gate" not in page.text
    assert "The registry was not changed." in page.text


def test_no_pictures_and_no_search_render() -> None:
    empty = dataclasses.replace(sample.trigger(False), candidates=(), best="", timesteps=())
    page = Page(render_html(bundle(trigger=empty, taus={}, detected={}, evaluated={})))
    assert "No pictures were kept." in page.text
    assert "img" not in page.tags


def test_numbers_that_are_not_finite_do_not_break_it() -> None:
    odd = dataclasses.replace(sample.statistic(1.0, 0.0, 1.0), score=float("nan"), value=float("inf"))
    card = dataclasses.replace(sample.scorecard(), before={"fid": sample.metric(float("nan"), 0.0)})
    tau = np.full(sample.SHAPE, np.nan, dtype=np.float32)
    verdict = sample.verdict(statistics={"u": odd})
    page = Page(render_html(bundle(verdict=verdict, scorecard=card, taus={"parity": tau})))
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize("responses", [(), (0.5,), (0.5, 0.5, 0.5, 0.5, 0.5)])
def test_the_scan_of_a_method_that_measures_less_renders(responses: tuple[float, ...]) -> None:
    """Peers hold no plain pictures, some none at all, and few answers or none."""
    bare = sample.end_point("negative/0.5", parity=0.0, content=0.0, response=responses, x0_response=())
    trigger = dataclasses.replace(sample.trigger(), method="elijah", candidates=(bare,), best=bare.name)
    detected = {"triggered": sample.detected(True)["triggered"][:0], "plain": sample.detected(True)["plain"][:0]}
    verdict = sample.verdict(statistics={"divergence_mean": sample.statistic(1.0, 0.0, 1.0)})
    page = Page(
        render_html(
            bundle(verdict=verdict, trigger=trigger, taus={bare.name: sample.tau()}, detected=detected, evaluated={})
        )
    )
    assert page.open == [] and "divergence mean" in page.text


@pytest.mark.parametrize("said", list(REPAIRS))
def test_the_story_tells_what_the_repair_took_and_what_it_left(said: str) -> None:
    candidate = sample.candidate(Action.PURIFY)
    assert candidate.purified is not None
    repaired = dataclasses.replace(candidate.purified, **REPAIRS[said])  # type: ignore[arg-type]
    story = Page(render_html(bundle(Word.BACKDOORED, candidate=dataclasses.replace(candidate, purified=repaired)))).text
    assert said in " ".join(story.split())
    assert ("still paints" in story) == ("still paints" in said)
