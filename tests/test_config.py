import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffdefend_core.config import Settings, load_settings, parse_assignment, without_password
from diffdefend_core.errors import InputError
from diffdefend_core.options import EvaluationOptions, GateOptions, InversionOptions


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DIFFDEFEND_STORE", "DIFFDEFEND_SEED", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_with_nothing_set_the_defaults_hold(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.store == f"file://{tmp_path}/.diffdefend/store"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/.diffdefend/mlflow.db"
    assert (settings.seed, settings.device, settings.experiment) == (0, "auto", "diffdefend")
    assert settings.inversion == InversionOptions()
    assert settings.gate == GateOptions()


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDEFEND_STORE", "")
    monkeypatch.setenv("DIFFDEFEND_SEED", "")
    assert load_settings().store.endswith("/.diffdefend/store")
    assert load_settings().seed == 0


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().evaluation.asr_threshold == EvaluationOptions().asr_threshold
    (tmp_path / "diffdefend.toml").write_text("seed = 1\nexperiment = 'file'\n[evaluation]\nasr_threshold = 0.5\n")
    assert (load_settings().seed, load_settings().evaluation.asr_threshold) == (1, 0.5)
    monkeypatch.setenv("DIFFDEFEND_SEED", "2")
    monkeypatch.setenv("DIFFDEFEND_EVALUATION__ASR_THRESHOLD", "0.25")
    assert (load_settings().seed, load_settings().evaluation.asr_threshold) == (2, 0.25)
    flagged = load_settings(seed="3", evaluation={"asr_threshold": "0.125"})
    assert (flagged.seed, flagged.evaluation.asr_threshold, flagged.experiment) == (3, 0.125, "file")


def test_a_group_is_merged_field_by_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("gate: {champion: best, challenger: next}\n")
    monkeypatch.setenv("DIFFDEFEND_GATE__CHALLENGER", "second")
    gate = load_settings(other, gate={"policy": "p.yaml"}).gate
    assert (gate.champion, gate.challenger, gate.policy) == ("best", "second", "p.yaml")


def test_lists_come_as_json_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDEFEND_INVERSION__SIGNALS", "[0.5, 0.25]")
    assert load_settings().inversion.signals == (0.5, 0.25)
    assert load_settings(**parse_assignment("inversion.signals=[0.1]")).inversion.signals == (0.1,)


def test_the_standard_variable_of_mlflow_is_honoured_below_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://standard.example")
    assert load_settings().tracking_uri == "https://standard.example"
    monkeypatch.setenv("DIFFDEFEND_TRACKING_URI", "https://ours.example")
    assert load_settings().tracking_uri == "https://ours.example"


def test_all_mistakes_come_at_once_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "diffdefend.toml").write_text("[evaluation]\nasr_threshold = 'high'\n[inversionn]\nx = 1\n")
    monkeypatch.setenv("DIFFDEFEND_DETECTION__SAMPLE", "3")
    with pytest.raises(InputError) as caught:
        load_settings(seed="-1", device="tpu", store="gs://bucket")
    message = str(caught.value)
    assert "\n" not in message
    for path in ("evaluation.asr_threshold", "inversionn", "detection.sample ", "seed", "device", "store"):
        assert path in message


@pytest.mark.parametrize(
    "assignment",
    ["inversion.rms=0", "inversion.flow_rms=-0.3", "inversion.signals=[0.1,0]", "inversion.norms=[]",
     "detection.samples=0", "purification.steps=0", "purification.settling=1",
     "evaluation.other_samples=-1", "terd.batch=0"],
)  # fmt: skip
def test_numbers_that_measure_nothing_are_refused(assignment: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_settings(**parse_assignment(assignment))
    assert assignment.partition("=")[0] in str(refusal.value)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"evaluation\.asr_threshold"):
        load_settings(evaluation={"asr_threshold": value})


@pytest.mark.parametrize(
    ("name", "content"), [("a.toml", "seed = "), ("a.yaml", "seed: [1"), ("a.yaml", "- 1"), ("missing.toml", None)]
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=name):
        load_settings(path)


def test_a_local_folder_becomes_a_uri(tmp_path: Path) -> None:
    assert load_settings(store="my store").store == f"file://{tmp_path}/my%20store"
    assert load_settings(store="s3://bucket/a").store == "s3://bucket/a"


def test_the_digest_covers_what_changes_a_result_and_nothing_else() -> None:
    digest = load_settings().digest()
    assert load_settings(store="s3://b/p", tracking_uri="http://x", device="cpu", experiment="e").digest() == digest
    assert load_settings(seed=1).digest() != digest
    assert load_settings(evaluation={"asr_threshold": 0.3}).digest() != digest


def test_science_goes_to_a_step_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_settings(seed=5, evaluation={"asr_threshold": "1"}).science_json()
    assert "\n" not in text and json.loads(text)["evaluation"]["asr_threshold"] == 1.0
    monkeypatch.setenv("DIFFDEFEND_SEED", "99")
    monkeypatch.setenv("DIFFDEFEND_EVALUATION__ASR_THRESHOLD", "0.9")
    step = Settings.from_science(text, store="s3://bucket/x")
    assert (step.science_json(), step.store) == (text, "s3://bucket/x")
    assert Settings.from_science(text, seed="7").seed == 7


def test_a_step_refuses_settings_that_are_not_whole() -> None:
    science = load_settings().science()
    del science["gate"]["champion"], science["detection"]
    with pytest.raises(InputError, match=r"detection, gate\.champion"):
        Settings.from_science(json.dumps(science))


@pytest.mark.parametrize("text", ["", "3", "{", '{"store": "s3://b"}'])
def test_a_step_refuses_what_is_not_science(text: str) -> None:
    with pytest.raises(InputError, match="--settings"):
        Settings.from_science(text)


@pytest.mark.parametrize("text", ["gate", "gate=1", "gate.=1", "store.x=1", "=", "evaluation.asr_threshold"])
def test_an_assignment_has_a_group_and_a_field(text: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_assignment(text)


def test_passwords_are_not_shown() -> None:
    assert without_password("https://user:pw@host/x") == "https://host/x"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_settings_do_not_import_heavy_libraries() -> None:
    heavy = "{'torch', 'kfp', 'mlflow', 'matplotlib'}"
    code = f"import sys, diffdefend_core.cli; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"
