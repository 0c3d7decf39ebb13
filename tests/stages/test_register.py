"""From finished stage folders to the registry, with real folders and a real MLflow on sqlite."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_records as sample
from safetensors.numpy import save_file

from diffdefend_core.artifacts import Action, Candidate, GateDecision, Outcome, Scorecard, Word
from diffdefend_core.config import Settings
from diffdefend_core.errors import ArtifactError, InputError, RegistryError
from diffdefend_core.gate.policy import shipped_policy
from diffdefend_core.io import folders, registry, tracking
from diffdefend_core.records import Record
from diffdefend_core.stages import announce
from diffdefend_core.stages.folder import parent, read_record
from diffdefend_core.stages.keep import keep
from diffdefend_core.stages.quarantine import quarantine
from diffdefend_core.stages.register import register

NAMES = (f"model-{index}" for index in itertools.count())
REPAIRED = "e" * 64


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def settings(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    yield Settings(store=f"file://{tmp_path}/store", tracking_uri=tracking_uri)
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "filled"}


def write(
    settings: Settings,
    stage: str,
    record: tuple[str, Record],
    parents: Sequence[tuple[str, str]] = (),
    tensors: tuple[str, Mapping[str, np.ndarray]] | None = None,
) -> str:
    folder = Path(settings.store.removeprefix("file://")).parent / "filled" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record[0]}.json").write_text(record[1].to_json(), encoding="utf-8")
    if tensors is not None:
        save_file(dict(tensors[1]), folder / tensors[0])
    uri = f"{settings.store}/{stage}/k/"
    folders.publish(folder, uri, stage=stage, key="k", producer="test", parents=[parent(*named) for named in parents])
    return uri


class Scan:
    """The finished folders of one made-up model, up to the scorecard."""

    def __init__(self, settings: Settings, word: Word, *, version: str | None = None, name: str | None = None,
                 asr_after: float = 0.0, rescan: Word = Word.CLEAN) -> None:  # fmt: skip
        self.settings = settings
        self.name = name or next(NAMES)
        self.found = word is Word.BACKDOORED
        registered = {"registered_name": self.name, "registered_version": version} if version else {}
        model = sample.model_ref(self.name, **registered)
        self.model_uri = write(settings, "load", ("model_ref", model))
        trigger = ("inverted_trigger", sample.trigger(self.found))
        taus = ("trigger.safetensors", {"tau/parity": sample.tau()})
        self.trigger_uri = write(settings, "invert_trigger", trigger, [("load", self.model_uri)], taus)
        chain = [("load", self.model_uri), ("invert_trigger", self.trigger_uri)]
        pictures = ("samples.safetensors", sample.detected(self.found))
        self.verdict_uri = write(settings, "detect", ("verdict", sample.verdict(word)), chain, pictures)
        self.chain = [*chain, ("detect", self.verdict_uri)]
        self.uris = (self.model_uri, self.trigger_uri, self.verdict_uri)
        self.candidate_uri = self._branch(word, rescan)
        self.scorecard_uri = self._evaluate(sample.scorecard(self.found, self.found, asr_after))

    def _branch(self, word: Word, rescan: Word) -> str:
        if word is Word.CLEAN:
            return keep(*self.uris, settings=self.settings)
        if word is Word.INCONCLUSIVE:
            return quarantine(*self.uris, settings=self.settings)
        candidate = sample.candidate(
            Action.PURIFY, rescan,
            model_uri=self.model_uri, trigger_uri=self.trigger_uri, verdict_uri=self.verdict_uri,
        )  # fmt: skip
        return write(self.settings, "purify", ("candidate", candidate), self.chain)

    def _evaluate(self, card: Scorecard) -> str:
        stage = {Word.CLEAN: "keep", Word.BACKDOORED: "purify", Word.INCONCLUSIVE: "quarantine"}
        word = read_record(type(sample.verdict()), self.verdict_uri, "verdict").word
        pictures = ("samples.safetensors", sample.evaluated(self.found))
        return write(self.settings, "evaluate", ("scorecard", card), [(stage[word], self.candidate_uri)], pictures)

    def register(self, **given: Any) -> GateDecision:
        self.gate_uri = register(self.candidate_uri, self.scorecard_uri, settings=self.settings, **given)
        return read_record(GateDecision, self.gate_uri, "gate_decision")


def existing(settings: Settings, count: int = 1, champion: str | None = None) -> str:
    """Register `count` unscanned versions of a new name, as a team would before it uses DiffDefend."""
    name = next(NAMES)
    for index in range(count):
        tags = {registry.DIGEST_TAG: str(index)}
        registry.register_source(settings.tracking_uri, name, f"s3://team/{index}/", tags)
    if champion is not None:
        registry.move_alias(settings.tracking_uri, name, "champion", champion)
    return name


def tags(settings: Settings, name: str, version: str) -> dict[str, str]:
    held = registry.tags_of(settings.tracking_uri, name, version)
    return {tag.removeprefix("diffdefend."): text for tag, text in held.items()}


def holder(settings: Settings, name: str, alias: str = "champion") -> str | None:
    return registry.alias_holder(settings.tracking_uri, name, alias)


def test_a_clean_model_from_a_folder_is_registered_and_becomes_the_champion(settings: Settings) -> None:
    scan = Scan(settings, Word.CLEAN)
    decision = scan.register()
    assert decision.outcome is Outcome.PROMOTED
    assert (decision.version, decision.original_version, decision.aliases) == ("1", None, ("champion",))
    found = registry.resolve(settings.tracking_uri, f"models:/{scan.name}@champion")
    assert (found.version, found.source_uri) == ("1", f"{scan.model_uri}model/")
    held = tags(settings, scan.name, "1")
    assert (held["outcome"], held["verdict"], held["model_digest"]) == ("promoted", "clean", "a" * 64)
    assert held["policy_digest"] == decision.policy_digest
    assert held["report"] == f"{scan.gate_uri}report.html"


def test_a_clean_registered_version_is_promoted_itself(settings: Settings) -> None:
    name = existing(settings, count=2, champion="1")
    decision = Scan(settings, Word.CLEAN, version="2", name=name).register()
    assert (decision.version, decision.original_version, decision.aliases) == ("2", "2", ("champion",))
    assert holder(settings, name) == "2"
    assert tags(settings, name, "2")["outcome"] == "promoted"
    assert "outcome" not in tags(settings, name, "1")


def test_a_repaired_model_is_the_challenger_and_the_original_loses_its_alias(settings: Settings) -> None:
    name = existing(settings, champion="1")
    scan = Scan(settings, Word.BACKDOORED, version="1", name=name)
    decision = scan.register()
    assert decision.outcome is Outcome.REPAIRED
    assert (decision.version, decision.original_version, decision.aliases) == ("2", "1", ("challenger",))
    assert decision.model_digest == REPAIRED
    assert holder(settings, name) is None
    assert registry.resolve(settings.tracking_uri, f"models:/{name}@challenger").source_uri == (
        f"{scan.candidate_uri}model/"
    )
    original, repaired = tags(settings, name, "1"), tags(settings, name, "2")
    assert (original["outcome"], original["verdict"]) == ("quarantined", "backdoored")
    assert (repaired["outcome"], repaired["verdict"], repaired["model_digest"]) == ("repaired", "clean", REPAIRED)
    assert (repaired["parent_name"], repaired["parent_version"], repaired["parent_digest"]) == (name, "1", "a" * 64)
    assert repaired["trigger_uri"] == scan.trigger_uri
    assert original["report"] == repaired["report"] == f"{scan.gate_uri}report.html"


def test_a_repaired_model_that_never_was_registered_has_no_parent_version(settings: Settings) -> None:
    scan = Scan(settings, Word.BACKDOORED)
    decision = scan.register()
    assert (decision.version, decision.original_version) == ("1", None)
    assert "parent_version" not in tags(settings, scan.name, "1")


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        (Word.INCONCLUSIVE, {}),
        (Word.BACKDOORED, {"asr_after": 0.2}),
        (Word.BACKDOORED, {"rescan": Word.BACKDOORED}),
    ],
)
def test_what_does_not_pass_is_quarantined_and_loses_both_aliases(
    settings: Settings, word: Word, changes: dict[str, Any]
) -> None:
    name = existing(settings, champion="1")
    registry.move_alias(settings.tracking_uri, name, "challenger", "1")
    registry.move_alias(settings.tracking_uri, name, "theirs", "1")
    decision = Scan(settings, word, version="1", name=name, **changes).register()
    assert (decision.outcome, decision.version, decision.aliases) == (Outcome.QUARANTINED, "1", ("theirs",))
    assert (holder(settings, name), holder(settings, name, "challenger")) == (None, None)
    assert tags(settings, name, "1")["outcome"] == "quarantined"
    with pytest.raises(RegistryError, match="version 2"):
        registry.resolve(settings.tracking_uri, f"models:/{name}/2")


def test_a_quarantined_version_leaves_the_champion_of_another_version_alone(settings: Settings) -> None:
    name = existing(settings, count=2, champion="1")
    Scan(settings, Word.INCONCLUSIVE, version="2", name=name).register()
    assert holder(settings, name) == "1"


def test_what_does_not_pass_is_not_brought_into_the_registry(settings: Settings) -> None:
    scan = Scan(settings, Word.INCONCLUSIVE)
    decision = scan.register()
    assert (decision.outcome, decision.version) == (Outcome.QUARANTINED, None)
    with pytest.raises(RegistryError, match="not in the registry"):
        registry.resolve(settings.tracking_uri, f"models:/{scan.name}/1")


@pytest.mark.parametrize("word", list(Word))
def test_run_again_it_is_the_same_folder_run_and_version(settings: Settings, word: Word) -> None:
    name = existing(settings, champion="1")
    scan = Scan(settings, word, version="1", name=name)
    first = scan.register()
    uri = scan.gate_uri
    assert scan.register() == first
    assert scan.gate_uri == uri
    client = tracking.connect(settings.tracking_uri)
    assert len(client.search_model_versions(f"name='{name}'")) == (2 if word is Word.BACKDOORED else 1)


def test_run_again_it_takes_no_alias_back_from_a_rollback(settings: Settings) -> None:
    name = existing(settings, count=2, champion="1")
    scan = Scan(settings, Word.CLEAN, version="2", name=name)
    scan.register()
    registry.move_alias(settings.tracking_uri, name, "champion", "1")
    assert scan.register().aliases == ()
    assert holder(settings, name) == "1"
    assert b"stays at version 1" in folders.read_file(scan.gate_uri, "report.html")


def test_run_again_it_withdraws_the_alias_that_somebody_gave_to_a_quarantined_version(settings: Settings) -> None:
    name = existing(settings)
    scan = Scan(settings, Word.INCONCLUSIVE, version="1", name=name)
    scan.register()
    registry.move_alias(settings.tracking_uri, name, "champion", "1")
    scan.register()
    assert holder(settings, name) is None


def test_the_scan_of_an_old_version_does_not_depose_a_newer_champion(settings: Settings) -> None:
    name = existing(settings, count=3, champion="3")
    decision = Scan(settings, Word.CLEAN, version="2", name=name).register()
    assert (decision.outcome, decision.aliases) == (Outcome.PROMOTED, ())
    assert holder(settings, name) == "3"


def crash(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registration end before its last step."""

    def fail(*_: object) -> None:
        raise OSError("the power went off")

    with monkeypatch.context() as broken:
        broken.setattr(announce, "finish", fail)
        with pytest.raises(OSError, match="power"):
            scan.register()


def test_a_crash_before_the_end_leaves_no_champion_and_a_retry_mends_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = Scan(settings, Word.CLEAN)
    crash(scan, monkeypatch)
    assert holder(settings, scan.name) is None
    assert tags(settings, scan.name, "1")["verdict"] == "clean"
    assert scan.register().aliases == ("champion",)
    assert holder(settings, scan.name) == "1"


def test_after_a_crash_the_report_still_names_the_alias_that_was_taken_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = existing(settings, champion="1")
    scan = Scan(settings, Word.INCONCLUSIVE, version="1", name=name)
    crash(scan, monkeypatch)
    assert holder(settings, name) is None
    scan.register()
    assert b"The alias @champion was removed from version 1" in folders.read_file(scan.gate_uri, "report.html")


def test_a_name_brings_what_passes_into_another_registered_model(settings: Settings) -> None:
    name, production = existing(settings), next(NAMES)
    decision = Scan(settings, Word.CLEAN, version="1", name=name).register(name=production)
    assert (decision.model_name, decision.version, decision.original_version) == (production, "1", "1")
    assert holder(settings, production) == "1"
    assert holder(settings, name) is None
    assert tags(settings, name, "1")["outcome"] == "promoted"


def test_the_run_holds_the_evidence(settings: Settings) -> None:
    scan = Scan(settings, Word.BACKDOORED)
    decision = scan.register()
    client = tracking.connect(settings.tracking_uri)
    assert decision.run_id is not None
    run = client.get_run(decision.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["asr_before"] == pytest.approx(0.98)
    assert run.data.params["policy_digest"] == decision.policy_digest
    assert json.loads(folders.read_file(scan.gate_uri, "policy.json")) == shipped_policy().content()
    listed = {path for folder in (None, "records", "pictures") for path in _paths(client, run.info.run_id, folder)}
    assert {"report.html", "report.json", "records/verdict.json", "pictures/trigger.png"} <= listed
    report = folders.read_file(scan.gate_uri, "report.html").decode()
    assert "was not changed" not in report
    assert report.count("data:image/png") == 7


def _paths(client: Any, run_id: str, folder: str | None) -> list[str]:
    return [item.path for item in client.list_artifacts(run_id, folder)]


def test_folders_of_different_runs_are_refused(settings: Settings, tmp_path: Path) -> None:
    scan = Scan(settings, Word.CLEAN)
    elsewhere = settings.model_copy(update={"store": f"file://{tmp_path}/store/other"})
    other = Scan(elsewhere, Word.INCONCLUSIVE)
    with pytest.raises(ArtifactError, match="was not made from"):
        register(scan.candidate_uri, other.scorecard_uri, settings=settings)
    with pytest.raises(ArtifactError, match="a folder of the detect stage"):
        keep(scan.model_uri, scan.trigger_uri, scan.candidate_uri, settings=settings)


def test_a_trigger_that_was_swapped_for_another_of_the_same_model_is_refused(settings: Settings) -> None:
    scan = Scan(settings, Word.CLEAN)
    elsewhere = settings.model_copy(update={"store": f"{settings.store}/swapped"})
    trigger = ("inverted_trigger", dataclasses.replace(sample.trigger(False), seed=99))
    taus = ("trigger.safetensors", {"tau/parity": sample.tau()})
    swapped = write(elsewhere, "invert_trigger", trigger, [("load", scan.model_uri)], taus)
    for stage in (keep, quarantine):
        with pytest.raises(ArtifactError, match=r"detect/k/ was not made from .*swapped"):
            stage(scan.model_uri, swapped, scan.verdict_uri, settings=settings)


def test_a_changed_scorecard_is_refused_before_the_registry_hears_of_it(settings: Settings) -> None:
    scan = Scan(settings, Word.CLEAN)
    path = Path(scan.scorecard_uri.removeprefix("file://")) / "scorecard.json"
    path.write_text(path.read_text().replace("6.1", "1.6"))
    with pytest.raises(ArtifactError, match=r"scorecard\.json"):
        scan.register()
    with pytest.raises(RegistryError):
        registry.resolve(settings.tracking_uri, f"models:/{scan.name}/1")


def test_a_forged_candidate_that_keeps_a_backdoored_model_does_not_pass(settings: Settings) -> None:
    scan = Scan(settings, Word.BACKDOORED)
    with pytest.raises(InputError, match="verdict is backdoored"):
        keep(*scan.uris, settings=settings)
    read = read_record(Candidate, scan.candidate_uri, "candidate")
    forged = dataclasses.replace(read, action=Action.KEEP, purified=None)
    scan.candidate_uri = write(settings, "keep", ("candidate", forged), scan.chain)
    pictures = ("samples.safetensors", sample.evaluated(False))
    elsewhere = settings.model_copy(update={"store": f"{settings.store}/forged"})
    card = ("scorecard", sample.scorecard())
    scan.scorecard_uri = write(elsewhere, "evaluate", card, [("keep", scan.candidate_uri)], pictures)
    assert scan.register().outcome is Outcome.QUARANTINED


def test_a_name_that_no_registry_takes_is_refused(settings: Settings) -> None:
    with pytest.raises(InputError, match="registered model"):
        Scan(settings, Word.CLEAN).register(name="a/b")


def test_register_keep_and_quarantine_need_no_torch() -> None:
    code = (
        "import sys\n"
        "import diffdefend_core.stages.register, diffdefend_core.stages.keep, diffdefend_core.stages.quarantine\n"
        "import diffdefend_core.report.html, safetensors.numpy\n"
        "print({'torch', 'diffusers', 'kfp', 'mlflow', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
