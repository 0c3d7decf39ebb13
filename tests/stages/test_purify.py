"""The purification stage: which reference R2 takes, and rounds that are folders of their own."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sample_records
import torch
from safetensors.torch import load_file, save_file
from tiny_scan import calibration_for, tiny_settings
from torch import Tensor

from diffdefend_core.artifacts import Candidate, PurifiedModel, Word
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError
from diffdefend_core.inversion.attractors import Attractors
from diffdefend_core.io import folders
from diffdefend_core.purification import Removal, Repair, repair
from diffdefend_core.stages import aims
from diffdefend_core.stages import purify as stage
from diffdefend_core.stages.aims import AHEAD, FURTHER, Suspect, suspect_in
from diffdefend_core.stages.effects import SMALL_FIRES_AT, Effects
from diffdefend_core.stages.folder import read_record, run_once, write_record
from diffdefend_core.stages.purify import purify
from diffdefend_core.stages.scan import scan

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("purify")


@pytest.fixture(scope="module")
def flagging(place: Path) -> str:
    return calibration_for(place / "calibration", "backdoored")


@pytest.fixture(scope="module")
def reference(place: Path, pristine_model: Path) -> Path:
    folder = Path(shutil.copytree(pristine_model, place / "reference"))
    weights = load_file(folder / WEIGHTS)
    save_file({name: 1.01 * value for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def settings_for(place: Path, calibration: str, **flags: dict[str, object]) -> Settings:
    return tiny_settings(place, calibration, **flags)


def test_r2_without_a_reference_is_refused(place: Path, flagging: str, pristine_model: Path) -> None:
    settings = settings_for(place, flagging, purification={"target": "r2"})
    with pytest.raises(InputError, match="r2 without a reference"):
        purify(*scan(str(pristine_model), settings=settings), settings=settings)


def test_r2_refuses_a_reference_that_its_own_scan_does_not_call_clean(
    place: Path, flagging: str, pristine_model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "suspect_in", lambda *given: pytest.fail("the suspect was asked first"))
    settings = settings_for(place, flagging, purification={"target": "r2"}, inversion={"reference": str(reference)})
    with pytest.raises(InputError, match="the scan of the reference says backdoored"):
        purify(*scan(str(pristine_model), settings=settings), settings=settings)


@pytest.mark.parametrize("target", ["r1", "r3", "r4"])
def test_the_target_and_the_reference_are_part_of_the_key(
    place: Path, flagging: str, pristine_model: Path, reference: Path, target: str
) -> None:
    settings = settings_for(place, flagging, purification={"target": target}, inversion={"reference": str(reference)})
    uri = purify(*scan(str(pristine_model), settings=settings), settings=settings)
    stages = [item.stage for item in folders.finished(uri, "purify").parents]
    assert stages == ["load", "invert_trigger", "detect", "load"]
    other = settings_for(place, flagging, purification={"target": "r1" if target == "r3" else "r3"},
                         inversion={"reference": str(reference)})  # fmt: skip
    assert purify(*scan(str(pristine_model), settings=other), settings=other) != uri


def test_a_finished_round_is_not_done_again_and_the_first_alone_settles_and_aims_less_far(
    tmp_path: Path, flagging: str, pristine_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It settles where pictures are unlearned, which all rounds do here."""
    monkeypatch.setattr(aims, "_pictured", lambda *given: True)
    monkeypatch.setattr(Effects, "targets", lambda self, suspect: (torch.zeros(suspect.shape),))
    beyond: list[float] = []
    asked: list[Suspect] = []

    def watched(*given: Any, **named: Any) -> Repair:
        beyond.append(named["beyond"])
        return repair(*given, **named)

    def asking(*given: Any) -> Suspect:
        asked.append(suspect_in(*given))
        return asked[-1]

    monkeypatch.setattr(stage, "repair", watched)
    monkeypatch.setattr(stage, "suspect_in", asking)
    settings = settings_for(tmp_path, flagging, purification={"rounds": 2})
    scanned = scan(str(pristine_model), settings=settings)
    uri = purify(*scanned, settings=settings)
    whole = {file.path: file.sha256 for file in folders.finished(uri, "purify").files}
    rounds = sorted((tmp_path / "store" / "purify_round").iterdir())
    purified = {item.name: read_record(PurifiedModel, f"file://{item}/", "purified") for item in rounds}
    first, second = sorted(purified, key=lambda name: purified[name].rounds)
    assert [purified[name].rounds for name in (first, second)] == [1, 2]
    spent = [purified[name].forward_equivalents for name in (first, second)]
    assert len(asked) == 1  # both rounds know it
    assert spent[0] > spent[1] - spent[0] > 0
    curves = [purified[name] for name in (first, second)]
    assert [(len(item.removal_loss), len(item.retention_loss)) for item in curves] == [(3, 4), (4, 4)]
    assert beyond[0] < beyond[1] == FURTHER
    written = {item.name: (item / "manifest.json").stat().st_mtime_ns for item in rounds}
    for folder in (
        tmp_path / "store" / "purify_round" / second,
        tmp_path / "store" / uri.rstrip("/").split("store/")[1],
    ):
        (folder / "manifest.json").unlink()  # what a kill in the second round leaves
    assert purify(*scanned, settings=settings) == uri
    assert {file.path: file.sha256 for file in folders.finished(uri, "purify").files} == whole
    again = {item.name: (item / "manifest.json").stat().st_mtime_ns for item in rounds}
    assert again[first] == written[first] and again[second] != written[second]
    candidate = read_record(Candidate, uri, "candidate").purified
    assert candidate is not None and candidate.rescan.word is Word.BACKDOORED
    kept = min(purified.values(), key=lambda item: (item.rescan.probability, item.rounds))  # nothing fires here
    assert candidate == dataclasses.replace(kept, rounds_tried=2, forward_equivalents=spent[1])
    assert {f"model/{path}": sha256 for path, sha256 in kept.weights_sha256.items()}.items() <= whole.items()


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (((0.02, Word.CLEAN), (0.3, Word.CLEAN), (0.05, Word.CLEAN)), 1),  # a later round may come back
        (((0.3, Word.CLEAN), (0.0, Word.INCONCLUSIVE), (0.05, Word.CLEAN)), 2),  # what fires counts before a suspicion
        (((0.0, Word.BACKDOORED), (0.005, Word.INCONCLUSIVE), (None, Word.BACKDOORED)), 2),
        (((0.0, Word.INCONCLUSIVE), (0.005, Word.INCONCLUSIVE), (0.0, Word.INCONCLUSIVE)), 1),  # less was changed
        (((None, Word.BACKDOORED), (0.05, Word.CLEAN), (0.0, Word.CLEAN)), 3),
    ],
)
def test_the_round_that_left_least_is_handed_on_at_the_price_of_all(
    tmp_path: Path, left: tuple[tuple[float | None, Word], ...], kept: int
) -> None:
    rounds = []
    for number, (fires, word) in enumerate(left, 1):
        record = dataclasses.replace(
            sample_records.purified(word), rounds=number, still_fires=fires, forward_equivalents=100 * number
        )
        rounds.append(
            run_once(
                stage.ROUND, store=f"file://{tmp_path}", parents=(), options={"round": number},
                work=partial(write_record, name="purified", record=record),
            )
        )  # fmt: skip
    uri, purified = stage._best_round(rounds)
    assert (uri, purified.rounds) == (rounds[kept - 1], kept)
    assert (purified.rounds_tried, purified.forward_equivalents) == (3, 300)


@pytest.mark.parametrize(("word", "rounds"), [(Word.CLEAN, 1), (Word.INCONCLUSIVE, 3), (Word.BACKDOORED, 3)])
def test_no_round_follows_one_whose_scan_is_clean(
    tmp_path: Path, flagging: str, pristine_model: Path, monkeypatch: pytest.MonkeyPatch, word: Word, rounds: int
) -> None:
    def done(*given: Any) -> None:
        write_record(given[-1], "purified", dataclasses.replace(sample_records.purified(word), still_fires=0.0))

    monkeypatch.setattr(stage, "_round", done)
    monkeypatch.setattr(stage, "suspect_in", lambda *given: None)
    settings = settings_for(tmp_path, flagging, purification={"rounds": 3})
    uri = purify(*scan(str(pristine_model), settings=settings), settings=settings)
    candidate = read_record(Candidate, uri, "candidate").purified
    assert candidate is not None and candidate.rounds_tried == rounds


def test_a_repair_does_not_change_the_suspect(tmp_path: Path, flagging: str, pristine_model: Path) -> None:
    settings = settings_for(tmp_path, flagging)
    scanned = scan(str(pristine_model), settings=settings)
    uri = purify(*scanned, settings=settings)
    for source, same in ((scanned[0], True), (uri, False)):
        folders.fetch(source, tmp_path / str(same), prefix="model/")
        found, before = (load_file(folder / WEIGHTS) for folder in (tmp_path / str(same) / "model", pristine_model))
        assert all(torch.equal(found[name], before[name]) for name in before) is same


class Trained(Exception):
    """Raised in place of a training whose arguments are all that a test looks at."""


@pytest.mark.parametrize(
    ("sides", "firing", "small_fires", "by_any"),
    [
        (0, 1, True, False), (0, 0, True, False), (0, 0, False, False), (2, 1, True, False), (2, 1, True, True),
        (2, 0, True, False),
    ],
)  # fmt: skip
def test_sides_in_less_noise_are_removed_with_a_trigger_on_any_background(
    place: Path,
    flagging: str,
    pristine_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    sides: int,
    firing: int,
    small_fires: bool,
    by_any: bool,
) -> None:
    turned = [torch.full((1, 8, 8), float(number)) for number in range(5, 5 + sides)]
    trained: list[Removal] = []
    targets: list[int] = []
    settling: list[float] = []
    beyond: list[float] = []

    def turn(suspect: Denoiser, *given: Any, **more: Any) -> Attractors:
        return Attractors(tuple(item.expand(suspect.shape) for item in turned), 100)

    def search(suspect: Denoiser, *given: Any, **more: Any) -> Attractors:
        return Attractors((torch.full(suspect.shape, 9.0),), 100)

    def train(model: Denoiser, phi: Denoiser, removals: list[Removal], *given: Any, **more: Any) -> Repair:
        trained[:] = removals
        targets.append(len(more["targets"]))
        settling.append(given[1].settling)
        beyond.append(more["beyond"])
        raise Trained

    asked: dict[str, dict[str, float]] = {}

    def fire(suspect: Denoiser, shifts: dict[str, Tensor], settings: Settings, **more: float) -> Effects:
        asked.update(dict.fromkeys(shifts, more))
        fires = small_fires if aims.SMALL in shifts else firing
        return Effects(settings, firing=tuple(shifts)[:fires], by_any_sampler=by_any)

    monkeypatch.setattr(Effects, "targets", lambda *given: (torch.zeros(1, 8, 8),))
    monkeypatch.setattr(aims, "in_less_noise", turn)
    monkeypatch.setattr(aims, "painting_most", search)
    monkeypatch.setattr(stage, "repair", train)
    monkeypatch.setattr(Effects, "of", fire)
    settings = settings_for(place, flagging)
    with pytest.raises(Trained):
        purify(*scan(str(pristine_model), settings=settings), settings=settings)
    counts = [sum(bool((item.shift == value).all()) for item in trained) for value in range(5, 5 + sides)]
    assert counts == [aims.SIDE_SHARE] * sides and len(trained) > sum(counts)
    small = sum(bool((item.shift == 9).all()) for item in trained)
    searched_on = sides + firing == 0  # at a small norm: what has no sides and does not fire
    assert small == (aims.MAIN_SHARE if searched_on else 0)  # removed whether it fires or not
    assert asked.get(aims.SMALL) == ({"at": SMALL_FIRES_AT} if searched_on else None)
    pictured = searched_on and small_fires
    assert {item.small for item in trained} == {pictured}
    assert {item.any_background for item in trained} == {sides > 0}
    assert beyond == [0.0 if sides else AHEAD]
    assert set(targets) == {int(pictured or by_any)}
    assert set(settling) == {settings.purification.settling if pictured or by_any else 0.0}
