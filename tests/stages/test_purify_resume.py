"""A repair that is killed goes on from its checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_scan import calibration_for, flags_of, tiny_settings

from diffdefend_core.config import Settings
from diffdefend_core.diffusion.training import UnfitStateError
from diffdefend_core.io import folders
from diffdefend_core.stages.checkpoint import Checkpoint
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.load import load
from diffdefend_core.stages.purify import purify

ROOT = Path(__file__).parents[2]
STEPS = 6
KILLED = """
import os, signal, sys
from diffdefend_core.cli import run_command
from diffdefend_core.stages.checkpoint import Checkpoint

write, states = Checkpoint.write, []

def write_and_die(self, state):
    states.append(write(self, state))
    if len(states) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.write = write_and_die
run_command(sys.argv[1:])
"""


class Steps:
    """Notes the training steps of a repair as they are reported."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase.startswith("purification") and total == STEPS:
            self.done.append(done)


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, object]]:
    yield {"steps": STEPS, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def scanned(
    tmp_path_factory: pytest.TempPathFactory, pristine_model: Path, options: dict[str, object]
) -> tuple[Settings, tuple[str, str, str]]:
    place = tmp_path_factory.mktemp("resume")
    settings = tiny_settings(place, calibration_for(place / "calibration", "backdoored"), purification=options)
    model = load(str(pristine_model), settings=settings)
    trigger = invert_trigger(model, settings=settings)
    return settings, (model, trigger, detect(model, trigger, settings=settings))


@pytest.fixture(scope="module")
def undisturbed(scanned: tuple[Settings, tuple[str, str, str]]) -> str:
    """The digest of the round, and so of all of its bytes."""
    settings, uris = scanned
    steps = Steps()
    purify(*uris, settings=settings, progress=steps)
    assert steps.done == list(range(1, STEPS + 1))
    return _round(settings)


def _round(settings: Settings) -> str:
    (folder,) = (Path(settings.store.removeprefix("file://")) / "purify_round").iterdir()
    return folders.finished(folder.as_uri(), "purify_round").digest


def _elsewhere(settings: Settings, place: Path) -> Settings:
    return settings.model_copy(update={"store": f"file://{place}/store"})


def test_a_killed_repair_goes_on_between_its_checkpoints_and_ends_byte_equal(
    scanned: tuple[Settings, tuple[str, str, str]], undisturbed: str, options: dict[str, object], tmp_path: Path
) -> None:
    settings, (model, trigger, verdict) = _elsewhere(scanned[0], tmp_path), scanned[1]
    flags = [*flags_of(settings), *(text for name, value in options.items() for text in ("--set", _flag(name, value)))]
    command = ["purify", "--model", model, "--trigger", trigger, "--verdict", verdict, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"checkpoints"}
    steps = Steps()
    purify(model, trigger, verdict, settings=settings, progress=steps)
    assert steps.done == [5, 6]
    assert _round(settings) == undisturbed


def _flag(name: str, value: object) -> str:
    return f"purification.{name}={value}"


@pytest.mark.parametrize("state", ["another network", "more steps", "no curves", "damaged"])
def test_a_state_of_no_use_is_said_and_left(
    scanned: tuple[Settings, tuple[str, str, str]],
    undisturbed: str,
    state: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, uris = _elsewhere(scanned[0], tmp_path), scanned[1]
    (kept,) = (Path(scanned[0].store.removeprefix("file://")) / "checkpoints").iterdir()
    found = Checkpoint(scanned[0].store, kept.stem).read()
    assert found is not None and int(found["done"]) == 4
    changed = {
        "another network": {**found, "weight/0": torch.zeros(7)},
        "more steps": {**found, "done": torch.tensor(STEPS + 1)},
        "no curves": {name: value for name, value in found.items() if name != "removal"},
        "damaged": found,
    }[state]
    Checkpoint(settings.store, kept.stem).write(changed)
    if state == "damaged":
        path = tmp_path / "store" / "checkpoints" / kept.name
        path.write_bytes(path.read_bytes()[:-1] + b"~")
    steps = Steps()
    purify(*uris, settings=settings, progress=steps)
    assert steps.done[0] == 1 and "the training starts anew" in capsys.readouterr().err
    assert _round(settings) == undisturbed


def test_an_unfit_state_changes_nothing(scanned: tuple[Settings, tuple[str, str, str]], undisturbed: str) -> None:
    from diffdefend_core.diffusion.training import Training
    from diffdefend_core.stages.model import fetch_denoiser

    denoiser = fetch_denoiser(scanned[1][0], "cpu").clone()
    training = Training(
        denoiser, lambda *_: torch.zeros(()), steps=3, learning_rate=0.1, generator=torch.Generator().manual_seed(0)
    )
    before = [parameter.clone() for parameter in training.parameters]
    with pytest.raises(UnfitStateError, match="another network"):
        training.restore({f"weight/{number}": torch.zeros_like(value) for number, value in enumerate(before)})
    assert all(torch.equal(one, other) for one, other in zip(before, training.parameters, strict=True))
