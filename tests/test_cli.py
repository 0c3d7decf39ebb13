"""The command line: what it prints where, and its exit codes. Stages are replaced, their folders are real."""

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sample_records

from diffdefend_core import stages
from diffdefend_core.artifacts import Action, GateDecision, Outcome, Word
from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import StoreError
from diffdefend_core.io import folders
from diffdefend_core.records import Record

ROOT = Path(__file__).parents[1]

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., str]:
    """Publish records (and texts) as a finished stage folder; return its URI."""

    def publish(stage: str, **files: Record | str) -> str:
        folder = tmp_path / "work" / stage
        folder.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, Record):
                (folder / f"{name}.json").write_text(content.to_json())
            else:
                (folder / name.replace("_", ".")).write_text(content)
        uri = f"file://{tmp_path}/store/{stage}/key/"
        folders.publish(folder, uri, stage=stage, key="key", producer="test")
        return uri

    return publish


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Put a function in the place of a stage; return the list of its calls."""

    def stage(name: str, answer: Any) -> Calls:
        calls: Calls = []

        def function(*arguments: Any, **keywords: Any) -> Any:
            calls.append((arguments, keywords))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        module = types.ModuleType(f"diffdefend_core.stages.{name}")
        setattr(module, name, function)
        if name == "scan":
            module.read = _read_scan  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(stages, name, module, raising=False)
        return calls

    return stage


def _read_scan(*uris: str) -> tuple[Record, ...]:
    word = next(word for word in Word if f"/{word.value}/" in uris[2])
    return sample_records.model_ref(), sample_records.trigger(), sample_records.verdict(word)


def _scan_uris(word: str) -> tuple[str, str, str]:
    return "file:///s/load/1/", "file:///s/invert_trigger/1/", f"file:///s/{word}/1/"


@pytest.mark.parametrize(("word", "code"), [("clean", 0), ("backdoored", 1), ("inconclusive", 3)])
def test_scan_turns_the_verdict_into_the_exit_code(
    stage: Callable[..., Calls], capsys: pytest.CaptureFixture[str], word: str, code: int
) -> None:
    calls = stage("scan", _scan_uris(word))
    assert run_command(["scan", "s3://models/digits/", "--seed", "4"]) == code
    out, err = capsys.readouterr()
    assert word in out and err == ""
    (arguments, keywords) = calls[0]
    assert arguments == ("s3://models/digits/",) and keywords["settings"].seed == 4


def test_method_and_reference_reach_the_settings(stage: Callable[..., Calls]) -> None:
    scans, searches = stage("scan", _scan_uris("clean")), stage("invert_trigger", "file:///s/invert_trigger/1/")
    assert run_command(["scan", "m"]) == 0
    assert run_command(["scan", "m", "--reference", "s3://ours/clean/"]) == 0
    assert run_command(["scan", "m", "--method", "elijah", "--set", "elijah.iterations=3"]) == 0
    assert run_command(["invert-trigger", "--model", "m", "--method", "terd"]) == 0
    plain, beside, elijah, terd = (keywords["settings"] for _, keywords in [*scans, *searches])
    assert (plain.inversion.method, plain.inversion.reference) == ("diffdefend", "")
    assert (beside.inversion.method, beside.inversion.reference) == ("diffdefend", "s3://ours/clean/")
    assert (elijah.inversion.method, elijah.elijah.iterations) == ("elijah", 3)
    assert terd.inversion.method == "terd"
    assert len({item.digest() for item in (plain, beside, elijah, terd)}) == 4


def test_scan_prints_json_alone(stage: Callable[..., Calls], capsys: pytest.CaptureFixture[str]) -> None:
    stage("scan", _scan_uris("backdoored"))
    assert run_command(["scan", "m", "-o", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    verdict = sample_records.verdict(Word.BACKDOORED)
    assert document["verdict"] == "backdoored"
    assert document["schema_version"] == "1.0" and document["tool"] == "diffdefend"
    assert document["probability"] == verdict.probability
    assert set(document["statistics"]) == set(verdict.statistics)
    assert document["reasons"] == list(verdict.reasons)
    assert document["config_digest"] == load_settings().digest()
    assert document["forward_equivalents"] == 202_000
    assert document["trigger_uri"] == "file:///s/invert_trigger/1/"
    for key in ("code_version", "model", "model_digest", "calibration_digest", "seconds"):
        assert key in document


@pytest.mark.parametrize("name", ["invert-trigger", "invert"])
def test_a_stage_prints_its_uri_alone_and_writes_it_for_the_pipeline(
    stage: Callable[..., Calls], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    calls = stage("invert_trigger", "file:///s/invert_trigger/1/")
    written = tmp_path / "not" / "there" / "uri"
    assert run_command([name, "--model", "file:///m/", "--uri-output", str(written)]) == 0
    assert capsys.readouterr() == ("file:///s/invert_trigger/1/\n", "")
    assert written.read_text() == "file:///s/invert_trigger/1/"
    assert calls[0][0] == ("file:///m/",)


@pytest.mark.parametrize("word", list(Word))
def test_detect_exits_0_whatever_the_verdict(
    stage: Callable[..., Calls], publish: Callable[..., str], tmp_path: Path, word: Word
) -> None:
    stage("detect", publish("detect", verdict=sample_records.verdict(word)))
    written = tmp_path / "deep" / "word"
    assert run_command(["detect", "--model", "m", "--trigger", "t", "--word-output", str(written)]) == 0
    assert written.read_text() == word.value


@pytest.mark.parametrize("name", ["keep", "purify", "quarantine"])
def test_the_branch_hands_on_its_three_inputs(stage: Callable[..., Calls], name: str) -> None:
    calls = stage(name, "file:///s/x/")
    assert run_command([name, "--verdict", "v", "--model", "m", "--trigger", "t"]) == 0
    assert calls[0][0] == ("m", "t", "v")


def test_an_empty_flag_is_one_that_was_not_given(stage: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline has to pass every parameter, set or not."""
    monkeypatch.setenv("DIFFDEFEND_STORE", "s3://bucket/from-environment")
    calls = stage("load", "file:///s/load/1/")
    assert run_command(["load", "--source", "m", "--name", "", "--store", "", "--settings", ""]) == 0
    assert calls[0][1]["name"] is None
    assert calls[0][1]["settings"].store == "s3://bucket/from-environment"


def test_the_settings_of_a_pipeline_reach_the_stage(stage: Callable[..., Calls]) -> None:
    science = load_settings(seed=11, gate={"champion": "best"}).science_json()
    calls = stage("evaluate", "file:///s/evaluate/1/")
    assert run_command(["evaluate", "--candidate", "c", "--settings", science, "--device", "cpu"]) == 0
    settings: Settings = calls[0][1]["settings"]
    assert (settings.science_json(), settings.device) == (science, "cpu")


def test_global_flags_stand_before_or_after_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("experiment: mine\n")
    before = ["--seed", "5", "--set", "gate.champion=best", "--config", "mine.yaml"]
    after = ["--set", "gate.challenger=next", "--store", "s3://b/p", "-o", "json"]
    assert run_command([*before, "config", "show", *after]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["store"], shown["experiment"]) == (5, "s3://b/p", "mine")
    assert (shown["gate"]["champion"], shown["gate"]["challenger"]) == ("best", "next")


def test_config_show_is_a_configuration_file_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert run_command(["config", "show", "--tracking-uri", "https://me:hush-hush@host/", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "hush-hush" not in out
    lines = [line for line in out.splitlines(keepends=True) if not line.startswith("config_digest")]
    (tmp_path / "again.yaml").write_text("".join(lines))
    assert load_settings(tmp_path / "again.yaml").seed == 3


def test_register_shows_its_result_in_a_pipeline(
    stage: Callable[..., Calls], publish: Callable[..., str], tmp_path: Path
) -> None:
    decision = GateDecision(
        outcome=Outcome.REPAIRED, model_name="m", model_digest="a" * 64, policy_digest="b" * 64, rules=()
    )
    gate_uri = publish("register", gate_decision=decision, report_html="<p>report</p>")
    scorecard_uri = publish("evaluate", scorecard=sample_records.scorecard(repaired=True))
    stage("register", gate_uri)
    output = tmp_path / "out" / "executor_output.json"
    artifact = {"name": "n", "uri": "s3://b/n", "metadata": {}, "type": {"schemaTitle": "system.Artifact"}}
    given = {"outputs": {"outputFile": str(output), "artifacts": {
        "report": {"artifacts": [artifact]}, "metrics": {"artifacts": [artifact]}}}}  # fmt: skip
    flags = {"--candidate": "c", "--scorecard": scorecard_uri, "--executor-input": json.dumps(given)}
    files = {f"--{name}-output": str(tmp_path / "out" / name) for name in ("outcome", "report", "metrics", "uri")}
    assert run_command(["register", *(word for pair in {**flags, **files}.items() for word in pair)]) == 0
    assert (tmp_path / "out" / "outcome").read_text() == "repaired"
    assert (tmp_path / "out" / "report").read_text() == "<p>report</p>"
    metrics = json.loads((tmp_path / "out" / "metrics").read_text())
    assert metrics["fid_before"] == 6.1 and metrics["asr_after"] == 0.0
    stated = json.loads(output.read_text())["artifacts"]
    assert stated["metrics"]["artifacts"][0]["metadata"] == metrics
    assert stated["report"]["artifacts"][0] == artifact


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outputs": {}}', '{"outputs": {"artifacts": {"report": {}}}}'])
def test_a_strange_executor_input_is_refused_or_left_out(
    stage: Callable[..., Calls], publish: Callable[..., str], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    stage("register", "file:///s/register/1/")
    scorecard_uri = publish("evaluate", scorecard=sample_records.scorecard())
    code = run_command(["register", "--candidate", "c", "--scorecard", scorecard_uri, "--executor-input", text])
    assert code == (0 if text == "" else 2)
    assert ("--executor-input" in capsys.readouterr().err) == (text != "")


@pytest.mark.parametrize(
    ("outcome", "word", "code"),
    [
        ("promoted", "clean", 0),
        ("quarantined", "clean", 1),
        ("repaired", "backdoored", 1),
        ("quarantined", "backdoored", 1),
        ("quarantined", "inconclusive", 3),
    ],
)
def test_run_turns_the_outcome_into_the_exit_code(
    publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    outcome: str, word: str, code: int,
) -> None:  # fmt: skip
    import pipelines.local

    uris = {"model_uri": publish("load", model_ref=sample_records.model_ref()),
            "verdict_uri": publish("detect", verdict=sample_records.verdict(Word(word)))}  # fmt: skip
    decision = GateDecision(
        outcome=Outcome(outcome), model_name="m", model_digest="a" * 64, policy_digest="b" * 64, rules=()
    )
    result = {
        "gate_uri": publish("register", gate_decision=decision, report_html="<p>"),
        "scorecard_uri": publish("evaluate", scorecard=sample_records.scorecard()),
        "candidate_uri": publish("keep", candidate=sample_records.candidate(Action.KEEP, **uris)),
        "verdict_uri": uris["verdict_uri"],
        "word": word,
        "outcome": outcome,
    }
    monkeypatch.setattr(pipelines.local, "run_gate", lambda *_arguments, **_keywords: result)
    assert run_command(["run", "m", "-o", "json"]) == code
    assert json.loads(capsys.readouterr().out) == result
    assert run_command(["run", "m"]) == code
    out = capsys.readouterr().out
    assert word in out and f"report: {result['gate_uri']}report.html" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["scan"],
        ["scan", "m", "--no-such-flag"],
        ["scan", "m", "-o", "xml"],
        ["detect", "--model", "m"],
        ["scan", "m", "--seed", "few"],
        ["scan", "m", "--method", "nonsense"],
        ["scan", "m", "--set", "inversion.method=nonsense"],
        ["scan", "m", "--set", "gate"],
        ["scan", "m", "--store", "ftp://x"],
        ["scan", "m", "--config", "absent.toml"],
        ["compile", "-o", "gate.txt"],
        ["detect", "--model", "m", "--trigger", "t", "--settings", "{}"],
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    stage: Callable[..., Calls], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    for name in ("scan", "detect"):
        stage(name, AssertionError("a misused command must not start"))
    assert run_command(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffdefend: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StoreError("no\nanswer", expected="an answer", action="wait"), "no answer; expected an answer; wait"),
        (ValueError("surprise"), "unexpected ValueError: surprise"),
        (KeyboardInterrupt(), "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'diffdefend[torch]'"),
        (ModuleNotFoundError("No module named 'strange'", name="strange"), "unexpected ModuleNotFoundError"),
    ],
)
def test_an_error_is_one_line_and_a_traceback_only_when_asked_for(
    stage: Callable[..., Calls], capsys: pytest.CaptureFixture[str], error: BaseException, text: str
) -> None:
    stage("scan", error)
    assert run_command(["scan", "m"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and "\n" not in err.strip() and "Traceback" not in err
    assert run_command(["scan", "m", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_lists_exit_codes_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    out = capsys.readouterr().out
    for text in ("0  pass", "1  backdoored", "2  the tool failed", "3  inconclusive", "scan", "purify", "doctor"):
        assert text in out


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", "https://s3.example")
    assert run_command(["doctor", "-o", "json"]) == 0
    out = capsys.readouterr().out
    checks = json.loads(out)
    assert "hush" not in out
    assert checks["s3 credentials"] == {"present": True, "remark": "for https://s3.example"}
    assert checks["kfp"]["present"] and checks["store"]["present"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert run_command(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "AWS_ACCESS_KEY_ID" in out
    assert all(re.match(r"(ok|no) \S.* \S", line) for line in out.splitlines())
    assert re.search(r"^(ok|no) securesystemslib [\dp]", out, re.MULTILINE)


def test_a_real_run_ends_with_the_line_of_the_stage_that_failed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffdefend_core", "run", f"{tmp_path}/absent", "--store", f"{tmp_path}/store"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("diffdefend: error: ") and "absent" in run.stderr and run.stderr.count("\n") == 1
