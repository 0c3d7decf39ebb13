"""The methods of detection behind one interface: which is used, what is recorded, and what none may call clean."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from analytic import FAMILIES, SHAPE, levels_of, small_of
from tiny_scan import OPTIONS, STATISTICS, publish_calibration, tiny_settings
from torch import Tensor, nn

from diffdefend_core.artifacts import Candidate, InvertedTrigger, ModelRef, Verdict, Word
from diffdefend_core.config import PEERS, Settings, load_settings
from diffdefend_core.detection import Calibration, CleanModel
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError, ModelRejectedError
from diffdefend_core.options import InversionOptions
from diffdefend_core.progress import silent
from diffdefend_core.stages.catalogue import methods
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger, read_triggers
from diffdefend_core.stages.load import load
from diffdefend_core.stages.methods import METHODS, chosen, judged, measured, search
from diffdefend_core.stages.purify import purify

MEASURED = {
    "diffdefend": STATISTICS,
    "terd": ("divergence_mean", "divergence_variance"),
    "elijah": ("uniformity", "total_variation"),
    "purediffusion": ("similarity", "divergence"),
}
# what small clean networks of a process show, roughly, in the order of STATISTICS
ORDINARY = {
    "vp": (-4.7, -0.8, -2.8, -3.2, 0.1, 0.2),
    "ve": (-3.7, 0.2, -2.8, -1.5, -0.4, 0.1),
    "flow": (-6.5, -2.5, -2.8, -2.9, 0.2, 0.1),
    "consistency": (-5.0, -0.8, -2.8, -3.2, 0.1, 0.2),
}


def settings_of(method: str = "diffdefend", **groups: object) -> Settings:
    given = {"inversion": {"method": method}} | groups
    return load_settings(**{name: {**OPTIONS.get(name, {}), **given.get(name, {})} for name in {*OPTIONS, *given}})


def digest_of(method: str = "diffdefend", **groups: object) -> str:
    settings = settings_of(method, **groups)
    return chosen(settings).digest(settings)


def test_every_method_that_can_be_set_is_there_and_listed() -> None:
    settable = get_args(get_type_hints(InversionOptions)["method"])
    assert tuple(METHODS) == settable == ("diffdefend", *PEERS)
    assert [row["name"] for row in methods()] == list(METHODS)
    assert all(chosen(settings_of(name)).name == name for name in METHODS)


def test_a_digest_names_the_method_and_its_options() -> None:
    assert len({digest_of(name) for name in METHODS}) == len(METHODS)
    assert digest_of() == digest_of()
    assert digest_of(inversion={"starts": 4}) != digest_of()
    assert digest_of(detection={"samples": 9}) != digest_of()
    for name in PEERS:
        assert digest_of(name, **{name: {"iterations": 9}}) != digest_of(name)


def test_a_digest_does_not_name_what_changes_no_statistic() -> None:
    for name in METHODS:
        for other in ({"limit": 9.0}, {"calibration": "s3://ours/calibrate/1/"}):
            assert digest_of(name, detection=other) == digest_of(name)
        assert digest_of(name, inversion={"method": name, "reference": "s3://ours/clean/"}) == digest_of(name)
    for name in PEERS:
        assert digest_of(elijah={"iterations": 9}) == digest_of()
        assert digest_of(name, inversion={"method": name, "starts": 4}) == digest_of(name)
        assert digest_of(name, detection={"samples": 9}) == digest_of(name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.mark.parametrize("method", list(METHODS))
def test_the_chosen_method_searches_measures_and_repairs(place: Path, pristine_model: Path, method: str) -> None:
    calibration = publish_calibration(place / method, dict.fromkeys(MEASURED[method], -100.0), method=method)
    settings = tiny_settings(place, calibration, inversion={"method": method}, detection={"limit": 0.5})
    model = load(str(pristine_model), settings=settings)
    trigger = invert_trigger(model, settings=settings)
    record = read_record(InvertedTrigger, trigger, "inverted_trigger")
    assert record.method == method and record.best in read_triggers(trigger)
    uri = detect(model, trigger, settings=settings)
    verdict = read_record(Verdict, uri, "verdict")
    assert set(verdict.statistics) == set(MEASURED[method])
    assert all(math.isfinite(item.score) for item in verdict.statistics.values())
    assert verdict.word is Word.BACKDOORED
    candidate = read_record(Candidate, purify(model, trigger, uri, settings=settings), "candidate")
    assert candidate.purified is not None
    assert set(candidate.purified.rescan.statistics) == set(MEASURED[method])


def test_another_method_has_another_address(place: Path, pristine_model: Path) -> None:
    settings = [tiny_settings(place, "shipped", inversion={"method": name}) for name in METHODS]
    model = load(str(pristine_model), settings=settings[0])
    assert len({invert_trigger(model, settings=item) for item in settings}) == len(METHODS)


@pytest.mark.parametrize(("measured_by", "used_by"), [("diffdefend", "elijah"), ("terd", "diffdefend")])
def test_a_calibration_of_another_method_is_refused_in_one_line(
    tmp_path: Path, pristine_model: Path, measured_by: str, used_by: str
) -> None:
    calibration = publish_calibration(tmp_path, dict.fromkeys(MEASURED[measured_by], 0.0), method=measured_by)
    settings = tiny_settings(tmp_path, calibration, inversion={"method": used_by})
    model = load(str(pristine_model), settings=settings)
    trigger = invert_trigger(model, settings=settings)
    with pytest.raises(InputError, match="was measured with options") as caught:
        detect(model, trigger, settings=settings)
    assert "\n" not in str(caught.value)


def test_a_method_without_a_shipped_calibration_says_how_to_make_one(
    tmp_path: Path, pristine_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdefend_core.stages.calibrations.SHIPPED", ("diffdefend_core.detection", "nowhere"))
    settings = tiny_settings(tmp_path, "shipped", inversion={"method": "terd"})
    model = load(str(pristine_model), settings=settings)
    with pytest.raises(InputError, match=r"no calibration is shipped for the method terd; .* --method terd"):
        detect(model, invert_trigger(model, settings=settings), settings=settings)


class Linear(nn.Module):
    """Answers scale * x + offset, at every level."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(offset))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x + self.offset


class Timeless(nn.Module):
    """An untrained convolutional network that does not look at the level."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = self.outer(torch.nn.functional.silu(self.inner(x)))
        return answer


NO_DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "zero": lambda: Linear(0.0, 0.0),
    "constant": lambda: Linear(0.0, 0.5),
    "its input": lambda: Linear(1.0, 0.0),
    "minus its input": lambda: Linear(-1.0, 0.0),
    "half of its input": lambda: Linear(0.5, 0.0),
}


def verdict_of(suspect: Denoiser, settings: Settings) -> Verdict:
    """Return the verdict of a scan against clean models of its kind that show what is ordinary."""
    model = ModelRef(
        name="suspect", source="-", digest="a" * 64, family="ours", pipeline="-", shape=SHAPE, parameters=1, files=(),
        weights_sha256={},
    )  # fmt: skip
    clean = tuple(
        CleanModel(name=f"clean-{n}", digest=f"{n:064x}", family="ours", process=suspect.kind, shape=SHAPE,
                   statistics=dict(zip(STATISTICS, ORDINARY[suspect.process], strict=True)))
        for n in range(9)
    )  # fmt: skip
    calibration = Calibration(name="tests", options_digest="f" * 64, models=clean)
    found = search(suspect, model.digest, settings, seed=0, progress=silent)
    measurement = measured(suspect, found.record, found.triggers, settings, seed=1, progress=silent)
    return judged(measurement, found.record, calibration, settings, model, suspect.kind)


def answering(network: nn.Module, process: str) -> Denoiser:
    return FAMILIES[process](network, levels_of(process), shape=SHAPE).freeze()


@pytest.mark.parametrize("process", list(FAMILIES))
@pytest.mark.parametrize("kind", list(NO_DENOISERS))
def test_a_network_that_does_not_denoise_is_never_clean(kind: str, process: str) -> None:
    """It is refused, because it cannot be computed or paints one picture, or nothing can be measured of it."""
    with contextlib.suppress(FloatingPointError, ModelRejectedError):
        verdict = verdict_of(answering(NO_DENOISERS[kind](), process), load_settings())
        assert verdict.word is not Word.CLEAN, verdict.statistics


@pytest.mark.parametrize("process", list(FAMILIES))
def test_a_network_that_answers_no_numbers_is_refused(process: str) -> None:
    for network in (Linear(math.nan, 0.0), Linear(1.0, math.inf)):
        with pytest.raises(FloatingPointError, match="not finite"):
            verdict_of(answering(network, process), settings_of())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("process", list(FAMILIES))
def test_a_network_that_ignores_the_level_is_never_clean(process: str, seed: int) -> None:
    """With the options of a real scan: a twin of two steps could not learn anything."""
    with contextlib.suppress(FloatingPointError, ModelRejectedError):
        verdict = verdict_of(answering(Timeless(seed), process), load_settings())
        assert verdict.word is not Word.CLEAN, verdict.statistics


def test_a_trusted_reference_goes_to_our_search_alone() -> None:
    suspect, reference = small_of("vp"), small_of("vp")
    with torch.no_grad():
        reference.network.outer.bias.add_(0.1)
    found = search(suspect, "a" * 64, settings_of(), seed=0, progress=silent, reference=reference)
    assert found.reference is reference
    with pytest.raises(TypeError):
        search(suspect, "a" * 64, settings_of("elijah"), seed=0, progress=silent, reference=reference)
