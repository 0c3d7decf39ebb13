"""Where a policy comes from, and that the content that was used is the one whose digest is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

from diffdefend_core.cli import run_command
from diffdefend_core.config import Settings, load_settings
from diffdefend_core.errors import InputError
from diffdefend_core.gate.policy import shipped_policy
from diffdefend_core.io.s3 import S3Store
from diffdefend_core.stages.policies import MAX_CARRIED, read_policy, settled

POLICY = """
version: 1
rules:
  - {id: fid, metric: scorecard.before.fid, direction: at_most, threshold: 9, min_n: 100}
  - {id: kid, metric: scorecard.before.kid, direction: at_most, threshold: 0.01, severity: warn, bound: worst}
waivers:
  - rule: fid
    model_digest: %s
    statement: Accepted for the pilot.
    owner: ann
    expires: 2020-01-01
""" % ("a" * 64)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def given(policy: Any) -> Settings:
    return load_settings(gate={"policy": policy})


def test_the_shipped_policy_is_the_default_and_is_not_copied_into_the_settings() -> None:
    assert read_policy(load_settings()) == shipped_policy()
    assert settled(load_settings()) == load_settings()


def test_a_path_a_uri_and_the_content_are_one_policy(file: Path) -> None:
    content = json.dumps(read_policy(given("policy.yaml")).content())
    digests = {read_policy(given(form)).digest() for form in ("policy.yaml", str(file), file.as_uri(), content)}
    assert len(digests) == 1 and digests != {shipped_policy().digest()}


def test_a_local_file_travels_as_its_content_to_steps_that_do_not_see_it(file: Path) -> None:
    settings = settled(given("policy.yaml"))
    digest, config = read_policy(settings).digest(), settings.digest()
    file.unlink()
    step = Settings.from_science(settings.science_json())
    assert (read_policy(step).digest(), step.digest()) == (digest, config)
    file.write_text(POLICY.replace("threshold: 9", "threshold: 8"))
    assert settled(given("policy.yaml")).digest() != config


def test_nothing_of_a_file_in_the_working_folder_gets_into_a_policy_that_travels(file: Path) -> None:
    """Settings from several places are merged name by name; a policy is always whole."""
    science = settled(given("policy.yaml")).science_json()
    Path("diffdefend.toml").write_text("[gate.policy]\nversion = 1\nrules = []\nwaivers = []\n")
    assert read_policy(Settings.from_science(science)) == read_policy(given("policy.yaml"))


def test_a_policy_that_is_too_long_for_a_parameter_is_told_where_to_go(file: Path) -> None:
    waivers = "".join(
        f"  - {{rule: fid, model_digest: a{number:063x}, statement: Accepted now., owner: ann, expires: 2030-01-01}}\n"
        for number in range(60)
    )
    file.write_text(POLICY + waivers)
    with pytest.raises(InputError, match=rf"at most {MAX_CARRIED}.*s3://"):
        settled(given("policy.yaml"))


@pytest.mark.s3
def test_a_policy_in_the_store_is_read_where_it_is_used(s3_environment: S3Server, file: Path) -> None:
    bucket = s3_environment.bucket()
    S3Store(bucket).put("gate/policy.yaml", file)
    settings = given(f"s3://{bucket}/gate/policy.yaml")
    assert settled(settings) == settings
    assert read_policy(settings) == read_policy(given("policy.yaml"))
    with pytest.raises(InputError, match="it is not there"):
        read_policy(given(f"s3://{bucket}/gate/other.yaml"))


@pytest.mark.parametrize(
    ("policy", "said"),
    [("absent.yaml", "absent.yaml cannot be read"), ("file:///absent/p.yaml", "cannot be read"),
     ("gs://x/p.yaml", "s3://bucket/prefix/"), ("s3://bucket/folder/", "it names a folder"),
     ({"version": 1}, "in the settings has a mistake: rules is missing")],
)  # fmt: skip
def test_a_policy_that_cannot_be_used_is_one_clear_line(policy: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_policy(given(policy))
    assert "\n" not in str(caught.value)


def test_a_command_refuses_a_wrong_policy_before_it_does_anything(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("version: 1\nrules: [{id: a}]\n")
    assert run_command(["config", "show", "--set", "gate.policy=bad.yaml"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    for path in ("rules[0].metric is missing", "rules[0].direction is missing", "bad.yaml has 2 mistakes"):
        assert path in err


def test_check_prints_one_mistake_a_line_and_exits_1(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("version: 1\nrules: [{id: a}]\nwavers: []\n")
    assert run_command(["policy", "check", "bad.yaml"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "rules[0].direction is missing", "rules[0].metric is missing", "wavers is no field of a policy",
    ]  # fmt: skip
    assert err == ""


def test_check_says_the_digest_and_what_should_be_looked_at(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["policy", "check", "policy.yaml"]) == 0
    digest = read_policy(given("policy.yaml")).digest()
    assert capfd.readouterr().out.splitlines() == [
        "waivers[0] of ann for fid expired on 2020-01-01T23:59:59Z: it is void",
        "kid only warns",
        f"ok, policy digest {digest}",
    ]
    assert run_command(["policy", "check", "policy.yaml", "-o", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["digest"] == digest
    assert run_command(["policy", "check", "absent.yaml"]) == 2


def test_explain_says_each_rule_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["policy", "explain", "policy.yaml", "-o", "json"]) == 0
    document = json.loads(capfd.readouterr().out)
    asks = {row["rule"]: (row["asks"], row["if_it_fails"]) for row in document["rules"]}
    assert list(asks) == ["verdict-clean", "records-agree", "metrics-there", "fid", "kid"]
    assert asks["fid"] == ("before.fid is at most 9, n at least 100", "block")
    assert asks["kid"] == ("before.kid is at most 0.01, worst end", "warn")
    assert [item["holds"] for item in document["waivers"]] == [False]


def test_explain_without_a_file_is_about_the_policy_that_holds(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["policy", "explain"]) == 0
    out = capfd.readouterr().out
    assert shipped_policy().digest() in out
    assert "after.fid rises by at most 10.0% against the original" in out
