"""All stages, one after the other, on a tiny real model: folders, reuse, tampering, kills and refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from tiny_scan import calibration_for, flags_of, repairing_flags, tiny_settings

from diffdefend_core.artifacts import Candidate, GateDecision, ModelRef, Outcome, Scorecard, Verdict, Word
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError, ModelRejectedError
from diffdefend_core.evaluation import plain_images
from diffdefend_core.io import folders, registry
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.progress import silent
from diffdefend_core.stages.detect import detect
from diffdefend_core.stages.evaluate import evaluate
from diffdefend_core.stages.folder import read_record
from diffdefend_core.stages.invert_trigger import invert_trigger
from diffdefend_core.stages.keep import keep
from diffdefend_core.stages.load import load
from diffdefend_core.stages.purify import purify
from diffdefend_core.stages.quarantine import quarantine
from diffdefend_core.stages.register import register

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODEL_FILES = {f"model/{name}" for name in (
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS)}  # fmt: skip
SCANNED = {
    "load": {"model_ref.json", *MODEL_FILES},
    "invert_trigger": {"inverted_trigger.json", "trigger.safetensors"},
    "detect": {"verdict.json", "samples.safetensors"},
    "evaluate": {"scorecard.json", "samples.safetensors"},
    "register": {"gate_decision.json", "policy.json", "report.html"},
}
BRANCHES = {
    "keep": {"candidate.json"},
    "quarantine": {"candidate.json"},
    "purify": {"candidate.json", *MODEL_FILES, "rescan/inverted_trigger.json", "rescan/trigger.safetensors"},
}  # fmt: skip
BRANCH = {Word.CLEAN: keep, Word.BACKDOORED: purify, Word.INCONCLUSIVE: quarantine}


@dataclasses.dataclass(frozen=True)
class Chain:
    """The folders of one run of all stages."""

    settings: Settings
    load: str
    invert_trigger: str
    detect: str
    branch: str
    evaluate: str
    register: str

    @property
    def scanned(self) -> tuple[str, str, str]:
        return self.load, self.invert_trigger, self.detect

    @property
    def verdict(self) -> Verdict:
        return read_record(Verdict, self.detect, "verdict")

    @property
    def candidate(self) -> Candidate:
        return read_record(Candidate, self.branch, "candidate")

    @property
    def decision(self) -> GateDecision:
        return read_record(GateDecision, self.register, "gate_decision")


def go(source: str, settings: Settings) -> Chain:
    """Run all stages on the model at `source`."""
    model = load(source, settings=settings)
    trigger = invert_trigger(model, settings=settings)
    verdict = detect(model, trigger, settings=settings)
    branch = BRANCH[read_record(Verdict, verdict, "verdict").word]
    candidate = branch(model, trigger, verdict, settings=settings)
    scorecard = evaluate(candidate, settings=settings)
    return Chain(settings, model, trigger, verdict, candidate, scorecard,
                 register(candidate, scorecard, settings=settings))  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def calibrations(place: Path) -> dict[str, str]:
    return {word.value: calibration_for(place / word.value, word.value) for word in Word}


@pytest.fixture(scope="module")
def clean(place: Path, calibrations: dict[str, str], pristine_model: Path) -> Chain:
    return go(str(pristine_model), tiny_settings(place, calibrations["clean"]))


@pytest.fixture(scope="module")
def aside(place: Path, calibrations: dict[str, str], pristine_model: Path) -> Chain:
    return go(str(pristine_model), tiny_settings(place, calibrations["inconclusive"]))


@pytest.fixture(scope="module")
def unrepaired(place: Path, calibrations: dict[str, str], pristine_model: Path) -> Chain:
    """A run whose calibration calls every model backdoored, the repaired one too."""
    return go(str(pristine_model), tiny_settings(place, calibrations["backdoored"]))


@pytest.fixture(scope="module")
def repaired_settings(place: Path, pristine_model: Path) -> Settings:
    """Settings under which the model is backdoored and its repaired version clean."""
    return tiny_settings(place, **repairing_flags(place / "repairing", pristine_model))


@pytest.fixture(scope="module")
def repaired(repaired_settings: Settings, pristine_model: Path) -> Chain:
    """A run from a registered version that was the champion."""
    uri, name = repaired_settings.tracking_uri, "team-faces"
    version = registry.register_source(uri, name, pristine_model.as_uri(), {registry.DIGEST_TAG: "none"})
    registry.move_alias(uri, name, "champion", version)
    return go(f"models:/{name}/{version}", repaired_settings)


@pytest.fixture
def elsewhere(place: Path, tmp_path: Path, calibrations: dict[str, str]) -> Settings:
    """The settings of `clean` with another, empty store."""
    return tiny_settings(place, calibrations["clean"], store=f"file://{tmp_path}/store")


def folder(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


@pytest.mark.parametrize("run", ["clean", "aside", "unrepaired", "repaired"])
def test_every_stage_leaves_its_folder(run: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    chain: Chain = request.getfixturevalue(run)
    action = chain.candidate.action.value
    uris = {stage: getattr(chain, stage) for stage in SCANNED} | {action: chain.branch}
    for stage, uri in uris.items():
        manifest = folders.fetch(uri, tmp_path / stage)
        assert (manifest.stage, uri) == (stage, f"{chain.settings.store}/{stage}/{manifest.key}/")
        assert {file.path for file in manifest.files} == {**SCANNED, **BRANCHES}[stage]
    digests = {stage: folders.finished(uri, stage).digest for stage, uri in uris.items()}
    parents = {stage: [item.digest for item in folders.finished(uri, stage).parents] for stage, uri in uris.items()}
    before = [digests[stage] for stage in ("load", "invert_trigger", "detect")]
    assert parents == {
        "load": [], "invert_trigger": before[:1], "detect": before[:2], action: before,
        "evaluate": [digests[action]], "register": [digests[action], digests["evaluate"]],
    }  # fmt: skip
    assert (chain.candidate.model_uri, chain.candidate.trigger_uri, chain.candidate.verdict_uri) == chain.scanned


def test_a_clean_model_becomes_the_champion(clean: Chain) -> None:
    assert (clean.verdict.word, clean.decision.outcome) == (Word.CLEAN, Outcome.PROMOTED)
    found = registry.resolve(clean.settings.tracking_uri, "models:/tiny@champion")
    assert found.source_uri == f"{clean.load}model/"
    assert clean.decision.aliases == ("champion",)
    card = read_record(Scorecard, clean.evaluate, "scorecard")
    assert card.after is None and {"fid", "kid", "precision", "recall"} == card.before.keys()


def test_what_could_not_be_told_is_set_aside(aside: Chain) -> None:
    assert (aside.verdict.word, aside.decision.outcome) == (Word.INCONCLUSIVE, Outcome.QUARANTINED)
    assert (aside.decision.version, aside.decision.aliases) == (None, ())


def test_a_model_that_stays_backdoored_does_not_pass(unrepaired: Chain) -> None:
    purified = unrepaired.candidate.purified
    assert purified is not None and purified.rounds == 1
    assert (unrepaired.verdict.word, purified.rescan.word) == (Word.BACKDOORED, Word.BACKDOORED)
    assert (unrepaired.decision.outcome, unrepaired.decision.version) == (Outcome.QUARANTINED, None)


def test_a_repaired_model_becomes_the_challenger(repaired: Chain) -> None:
    purified, uri, name = repaired.candidate.purified, repaired.settings.tracking_uri, "team-faces"
    assert purified is not None and purified.rescan.word is Word.CLEAN
    assert repaired.decision.outcome is Outcome.REPAIRED, repaired.decision.rules
    assert (repaired.decision.version, repaired.decision.original_version) == ("2", "1")
    assert registry.aliases_of(uri, name, "1") == () and registry.aliases_of(uri, name, "2") == ("challenger",)
    assert registry.alias_holder(uri, name, "champion") is None
    assert registry.tags_of(uri, name, "1")["diffdefend.outcome"] == "quarantined"
    assert registry.tags_of(uri, name, "2")["diffdefend.parent_digest"] == purified.parent_digest
    card = read_record(Scorecard, repaired.evaluate, "scorecard")
    assert card.after is not None and card.before.keys() == card.after.keys() >= {"fid", "kid", "asr", "mse", "ssim"}


def test_what_is_registered_as_repaired_is_another_model_that_diffusers_loads(repaired: Chain, tmp_path: Path) -> None:
    source = registry.resolve(repaired.settings.tracking_uri, "models:/team-faces@challenger").source_uri
    theirs = DDPMPipeline.from_pretrained(folder(source)).unet.state_dict()
    original = load_file(folder(repaired.load) / "model" / WEIGHTS)
    assert theirs.keys() == original.keys()
    assert any(not torch.equal(theirs[name], original[name]) for name in theirs)
    again = load("models:/team-faces@challenger", settings=repaired.settings)
    purified = repaired.candidate.purified
    assert purified is not None and read_record(ModelRef, again, "model_ref").digest == purified.digest


def no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage that computes needs the model first."""
    name = "diffdefend_core.stages.model.load_denoiser"
    monkeypatch.setattr(name, lambda *_: pytest.fail("a finished stage was computed again"))


@pytest.mark.parametrize("run", ["clean", "aside", "unrepaired"])
def test_run_again_nothing_is_computed(
    run: str, request: pytest.FixtureRequest, pristine_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain: Chain = request.getfixturevalue(run)
    written = {path: path.stat().st_mtime_ns for path in folder(chain.settings.store).rglob("*")}
    no_computing(monkeypatch)
    assert go(str(pristine_model), chain.settings) == chain
    assert {path: path.stat().st_mtime_ns for path in folder(chain.settings.store).rglob("*")} == written


def test_with_another_seed_it_is_computed(clean: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    no_computing(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        invert_trigger(clean.load, settings=clean.settings.model_copy(update={"seed": 1}))


def test_the_result_is_the_same_in_another_store(clean: Chain, elsewhere: Settings) -> None:
    trigger = invert_trigger(clean.load, settings=elsewhere)
    verdict = detect(clean.load, trigger, settings=elsewhere)
    for uri, earlier, stage in ((trigger, clean.invert_trigger, "invert_trigger"), (verdict, clean.detect, "detect")):
        assert folders.finished(uri, stage).digest == folders.finished(earlier, stage).digest
        assert uri.rsplit("/", 2)[1] == earlier.rsplit("/", 2)[1]


@contextlib.contextmanager
def flipped(path: Path) -> Iterator[None]:
    """Change one byte of a file, and put it back."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


STEPS: dict[str, Callable[[Chain, Settings], str]] = {
    "invert_trigger": lambda chain, settings: invert_trigger(chain.load, settings=settings),
    "detect": lambda chain, settings: detect(chain.load, chain.invert_trigger, settings=settings),
    "keep": lambda chain, settings: keep(*chain.scanned, settings=settings),
    "quarantine": lambda chain, settings: quarantine(*chain.scanned, settings=settings),
    "purify": lambda chain, settings: purify(*chain.scanned, settings=settings),
    "evaluate": lambda chain, settings: evaluate(chain.branch, settings=settings),
    "register": lambda chain, settings: register(chain.branch, chain.evaluate, settings=settings),
}


@pytest.mark.parametrize(
    ("run", "stage", "name", "step"),
    [
        ("clean", "load", f"model/{WEIGHTS}", "invert_trigger"),
        ("clean", "load", "model/unet/config.json", "invert_trigger"),
        ("clean", "load", "model_ref.json", "invert_trigger"),
        ("clean", "invert_trigger", "inverted_trigger.json", "detect"),
        ("clean", "invert_trigger", "trigger.safetensors", "detect"),
        ("clean", "detect", "verdict.json", "keep"),
        ("aside", "detect", "verdict.json", "quarantine"),
        ("unrepaired", "detect", "verdict.json", "purify"),
        ("unrepaired", "invert_trigger", "trigger.safetensors", "purify"),
        ("unrepaired", "load", f"model/{WEIGHTS}", "purify"),
        ("unrepaired", "branch", f"model/{WEIGHTS}", "evaluate"),
        ("unrepaired", "branch", "candidate.json", "evaluate"),
        ("clean", "branch", "candidate.json", "evaluate"),
        ("clean", "evaluate", "scorecard.json", "register"),
        ("clean", "detect", "verdict.json", "register"),
    ],
)
def test_what_was_changed_in_between_is_refused(
    run: str, stage: str, name: str, step: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    chain: Chain = request.getfixturevalue(run)
    settings = chain.settings.model_copy(update={"store": f"file://{tmp_path}/store"})
    before = registry.aliases_of(settings.tracking_uri, "tiny", "1")
    with flipped(folder(getattr(chain, stage)) / name), pytest.raises(ArtifactError, match=r"changed|is not what"):
        STEPS[step](chain, settings)
    assert not (tmp_path / "store").exists()
    assert registry.aliases_of(settings.tracking_uri, "tiny", "1") == before


def test_a_file_that_was_added_to_a_model_is_refused(clean: Chain, elsewhere: Settings) -> None:
    added = folder(clean.load) / "model" / "unet" / "added.json"
    added.write_text("{}")
    try:
        with pytest.raises(ArtifactError, match="added"):
            invert_trigger(clean.load, settings=elsewhere)
    finally:
        added.unlink()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_stage_that_fails_at_its_work_leaves_nothing_and_goes_through_the_next_time(
    clean: Chain, elsewhere: Settings, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("diffdefend_core.stages.invert_trigger.write_inversion", fail)
        with pytest.raises(type(error)):
            invert_trigger(clean.load, settings=elsewhere)
    assert not folder(elsewhere.store).exists()
    folders.fetch(invert_trigger(clean.load, settings=elsewhere), folder(elsewhere.store).parent / "into")


KILLED = """
import os, signal, sys
from diffdefend_core.cli import run_command
from diffdefend_core.io.directory import DirectoryStore

put = DirectoryStore.put

def put_until_the_manifest(self, key, path):
    if key.endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, key, path)

DirectoryStore.put = put_until_the_manifest
run_command(sys.argv[1:])
"""


def test_a_stage_that_is_killed_while_it_publishes_is_unfinished_until_it_runs_again(
    clean: Chain, elsewhere: Settings, tmp_path: Path
) -> None:
    command = ["invert-trigger", "--model", clean.load, *flags_of(elsewhere)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (folder(elsewhere.store) / "invert_trigger").iterdir()
    assert {path.name for path in left.iterdir()} == SCANNED["invert_trigger"]
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        detect(clean.load, f"file://{left}/", settings=elsewhere)
    uri = invert_trigger(clean.load, settings=elsewhere)
    assert folder(uri) == left
    assert detect(clean.load, uri, settings=elsewhere)


def test_changed_options_have_another_address(clean: Chain, calibrations: dict[str, str], place: Path) -> None:
    changed = tiny_settings(place, calibrations["clean"], detection={"limit": 5.0}, evaluation={"samples": 9})
    assert invert_trigger(clean.load, settings=changed) == clean.invert_trigger
    assert detect(clean.load, clean.invert_trigger, settings=changed) != clean.detect
    assert evaluate(clean.branch, settings=changed) != clean.evaluate


def test_the_findings_of_the_static_checks_are_part_of_the_verdict(
    elsewhere: Settings, pristine_model: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(pristine_model, tmp_path / "model"))
    (source / "training.json").write_text("{}")
    model = load(str(source), settings=elsewhere)
    verdict = detect(model, invert_trigger(model, settings=elsewhere), settings=elsewhere)
    findings = read_record(Verdict, verdict, "verdict").findings
    assert findings == ("training.json belongs to no component and is not used",)


def test_another_calibration_is_another_verdict_on_the_same_measurement(clean: Chain, unrepaired: Chain) -> None:
    assert clean.invert_trigger == unrepaired.invert_trigger and clean.detect != unrepaired.detect
    values = [{name: item.value for name, item in run.verdict.statistics.items()} for run in (clean, unrepaired)]
    assert values[0] == pytest.approx(values[1])
    assert clean.verdict.calibration_digest != unrepaired.verdict.calibration_digest


def test_a_calibration_of_other_options_or_of_nothing_is_refused(clean: Chain, place: Path) -> None:
    other = tiny_settings(place, clean.settings.detection.calibration, detection={"samples": 9})
    with pytest.raises(InputError, match="was measured with options"):
        detect(clean.load, clean.invert_trigger, settings=other)
    empty = tiny_settings(place, one_model_calibration(place))
    with pytest.raises(InputError, match="holds 1 clean models"):
        detect(clean.load, clean.invert_trigger, settings=empty)


def one_model_calibration(place: Path) -> str:
    from tiny_scan import STATISTICS, publish_calibration

    return publish_calibration(place / "one", dict.fromkeys(STATISTICS, 0.0), models=1)


def test_a_repair_that_was_scanned_against_another_calibration_does_not_pass(
    repaired: Chain, calibrations: dict[str, str], place: Path
) -> None:
    """Whoever runs the purify stage by hand cannot choose an easier scan for it."""
    gate = {"policy": {"version": 1, "rules": []}}
    known = {"known_trigger": repaired.settings.evaluation.known_trigger}
    easy = tiny_settings(place, calibrations["clean"], gate=gate, evaluation=known)
    candidate = purify(*repaired.scanned, settings=easy)
    purified = read_record(Candidate, candidate, "candidate").purified
    assert purified is not None and purified.rescan.word is Word.CLEAN
    decision = read_record(
        GateDecision, register(candidate, evaluate(candidate, settings=easy), settings=easy), "gate_decision"
    )
    assert decision.outcome is Outcome.QUARANTINED
    assert [rule.id for rule in decision.rules if rule.result != "pass"] == ["records-agree"]


@pytest.mark.parametrize("name", ["conv_out.weight", "conv_in.weight"])
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_a_model_whose_answers_overflow_is_never_clean(
    model_folder: Path, elsewhere: Settings, name: str, scale: float
) -> None:
    tensors = load_file(model_folder / WEIGHTS)
    tensors[name] = tensors[name] * scale
    save_file(tensors, model_folder / WEIGHTS)
    model = load(str(model_folder), settings=elsewhere)
    with pytest.raises(ModelRejectedError, match="the model cannot be computed"):
        invert_trigger(model, settings=elsewhere)
    assert [path.name for path in folder(elsewhere.store).iterdir()] == ["load"]


def test_a_model_whose_twin_cannot_learn_is_inconclusive(model_folder: Path, elsewhere: Settings) -> None:
    """Weights so large that a training step is lost in rounding: twin and suspect agree, which says nothing."""
    tensors = load_file(model_folder / WEIGHTS)
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * 1e16
    save_file(tensors, model_folder / WEIGHTS)
    model = load(str(model_folder), settings=elsewhere)
    verdict = detect(model, invert_trigger(model, settings=elsewhere), settings=elsewhere)
    assert read_record(Verdict, verdict, "verdict").word is Word.INCONCLUSIVE


def test_images_that_are_not_finite_are_not_evaluated(clean: Chain) -> None:
    denoiser = load_denoiser(folder(clean.load) / "model")
    options = clean.settings.evaluation
    assert plain_images(denoiser, options, 0, silent).isfinite().all()
    with torch.no_grad():
        next(denoiser.network.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="images are not finite"):
        plain_images(denoiser, options, 0, silent)


@pytest.mark.parametrize("option", ["known_trigger", "reference"])
@pytest.mark.parametrize("content", [b"", b"not what it should be"], ids=["empty", "garbage"])
def test_a_file_for_the_evaluation_that_is_none_is_refused(
    option: str, content: bytes, clean: Chain, tmp_path: Path
) -> None:
    (tmp_path / "given").write_bytes(content)
    evaluation = dataclasses.replace(clean.settings.evaluation, **{option: (tmp_path / "given").as_uri()})
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(clean.branch, settings=clean.settings.model_copy(update={"evaluation": evaluation}))
