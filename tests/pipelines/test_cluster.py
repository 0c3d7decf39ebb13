"""`submit` and `schedule` through the real kfp client, against a server that speaks its REST API."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest
from kfp_server import KfpServer, kfp_server
from s3_server import free_port

from diffdefend_core.cli import run_command

CRON = "0 0 3 * * *"
SECRET = "not-for-any-log"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))
    for name in ("DIFFDEFEND_KFP_TOKEN", "DIFFDEFEND_KFP_COOKIE", "DIFFDEFEND_KFP_HOST", "DIFFDEFEND_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    with kfp_server() as state:
        yield state


@pytest.fixture
def call(server: KfpServer, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command against the server; return exit code, stdout and stderr. No line may show the secret."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command([*arguments, "--host", server.url])
        out, err = capfd.readouterr()
        assert SECRET not in out + err and "Traceback" not in out + err
        return code, out, err

    return call


def test_submit_starts_one_run_of_the_gate_and_prints_its_page(server: KfpServer, call: Any) -> None:
    code, out, err = call("submit", "models:/digits/3", "--gpu", "--seed", "7", "--store", "s3://bucket/store/",
                          "--service-account", "runner", "--node-selector", "pool=a100")  # fmt: skip
    assert (code, out, err) == (0, f"{server.url}/#/runs/details/r0\n", "")
    (run,) = server.runs
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["source"], parameters["store"]) == ("models:/digits/3", "s3://bucket/store/")
    assert json.loads(parameters["settings"])["seed"] == 7 and run["service_account"] == "runner"
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "diffdefend-gate"
    executors = run["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-detect"]["nodeSelector"]["labels"] == {"pool": "a100"}
    assert [item["display_name"] for item in server.experiments] == ["diffdefend"]


def test_a_store_on_this_machine_is_not_sent(server: KfpServer, call: Any) -> None:
    assert call("submit", "s3://models/digits/", "-o", "json")[0] == 0
    assert server.runs[0]["runtime_config"]["parameters"]["store"] == ""


@pytest.mark.parametrize("source", ["zoo/digits/base-a", "/tmp/model", "file:///tmp/model/", "hf://a/b", ""])
def test_a_model_that_pods_cannot_see_is_refused_before_anything_is_sent(
    server: KfpServer, call: Any, source: str
) -> None:
    code, _, err = call("submit", source)
    assert code == 2 and "pods do not see this machine" in err and server.runs == []


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--toleration", "a b"], "toleration"),
        (["--toleration", "gpu:Sometimes"], "toleration"),
        (["--node-selector", "pool"], "node selector"),
        (["--scratch", "20GB"], "scratch"),
        (["--scratch", "", "--scratch-class", "fast"], "storage class"),
        (["--memory", "lots"], "memory"),
        (["--require-digests"], "images without a digest"),
        (["--retries", "-1"], "--retries"),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_started(
    server: KfpServer, call: Any, flags: list[str], word: str
) -> None:
    code, out, err = call("submit", "models:/m/1", *flags)
    assert code == 2 and out == "" and word in err and err.count("\n") == 1
    assert server.runs == []


def test_a_token_is_sent_and_never_shown(server: KfpServer, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = SECRET
    code, _, err = call("submit", "models:/m/1")
    assert code == 2 and "answered 401" in err and "DIFFDEFEND_KFP_TOKEN" in err
    monkeypatch.setenv("DIFFDEFEND_KFP_TOKEN", SECRET)
    assert call("submit", "models:/m/1", "--verbose")[0] == 0


def test_the_projected_token_of_a_pod_is_used(
    server: KfpServer, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.token = SECRET
    (tmp_path / "token").write_text(SECRET)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert call("submit", "models:/m/1")[0] == 0


def test_a_server_that_is_not_there_is_one_line(call: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["submit", "models:/m/1", "--host", f"http://127.0.0.1:{free_port()}"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("diffdefend: error: no answer from http://127.0.0.1:") and "port-forward" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("host", ["", "kfp.example.org", "ftp://kfp", "http://user:not-for-any-log@kfp"])
def test_a_wrong_host_is_refused(server: KfpServer, capfd: pytest.CaptureFixture[str], host: str) -> None:
    assert run_command(["submit", "models:/m/1", "--host", host]) == 2
    err = capfd.readouterr().err
    assert "host" in err and SECRET not in err and err.count("\n") == 1


def test_a_refusing_server_is_quoted(server: KfpServer, call: Any) -> None:
    server.refuse[("POST", "runs")] = 403
    code, _, err = call("submit", "models:/m/1")
    assert code == 2 and "answered 403: told to refuse runs" in err and err.count("\n") == 1


def test_a_server_with_many_users_wants_a_namespace(server: KfpServer, call: Any) -> None:
    server.multi_user = True
    code, _, err = call("submit", "models:/m/1")
    assert code == 2 and "--namespace" in err and server.runs == []
    assert call("submit", "models:/m/1", "--namespace", "team-a")[0] == 0
    assert server.experiments[0]["namespace"] == "team-a"


def test_a_schedule_is_created_shown_replaced_and_removed(server: KfpServer, call: Any) -> None:
    assert call("schedule", "create", "nightly", "models:/digits@champion", "--cron", CRON)[0] == 0
    (made,) = server.recurring
    assert made["trigger"]["cron_schedule"]["cron"] == CRON
    assert (str(made["max_concurrency"]), made["no_catchup"]) == ("1", True)
    code, out, _ = call("schedule", "show", "-o", "json")
    (shown,) = json.loads(out)
    assert code == 0 and (shown["name"], shown["cron"], shown["enabled"]) == ("nightly", CRON, True)
    assert call("schedule", "update", "nightly", "models:/a/1", "models:/b/2", "--cron", "@daily")[0] == 0
    (new,) = server.recurring
    assert new["recurring_run_id"] != made["recurring_run_id"]
    assert new["runtime_config"]["parameters"]["sources"] == ["models:/a/1", "models:/b/2"]
    assert new["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "diffdefend-scan"
    assert call("schedule", "remove", "nightly")[:2] == (0, "removed 1 schedule nightly\n")
    assert server.recurring == [] and call("schedule", "show")[:2] == (0, "")


def test_a_failed_update_leaves_the_old_schedule(server: KfpServer, call: Any) -> None:
    call("schedule", "create", "nightly", "models:/a/1", "--cron", CRON)
    server.refuse[("POST", "recurringruns")] = 500
    assert call("schedule", "update", "nightly", "models:/a/2", "--cron", CRON)[0] == 2
    assert [item["runtime_config"]["parameters"]["source"] for item in server.recurring] == ["models:/a/1"]


def test_an_update_that_could_not_delete_is_mended_by_the_next(server: KfpServer, call: Any) -> None:
    call("schedule", "create", "nightly", "models:/a/1", "--cron", CRON)
    server.refuse[("DELETE", "recurringruns")] = 500
    assert call("schedule", "update", "nightly", "models:/a/2", "--cron", CRON)[0] == 2
    assert len(server.recurring) == 2
    server.refuse.clear()
    assert call("schedule", "update", "nightly", "models:/a/3", "--cron", CRON)[0] == 0
    assert [item["runtime_config"]["parameters"]["source"] for item in server.recurring] == ["models:/a/3"]


def test_every_page_of_schedules_is_read(server: KfpServer, call: Any) -> None:
    for name in "abc":
        call("schedule", "create", name, "models:/m/1", "--cron", CRON)
    server.page_size = 1
    assert [item["name"] for item in json.loads(call("schedule", "show", "-o", "json")[1])] == ["a", "b", "c"]
    assert call("schedule", "create", "c", "models:/m/1", "--cron", CRON)[0] == 2
    assert len(server.recurring) == 3


@pytest.mark.parametrize("verb", ["update", "remove"])
def test_an_unknown_schedule_is_named_with_those_that_are_there(server: KfpServer, call: Any, verb: str) -> None:
    call("schedule", "create", "weekly", "models:/m/1", "--cron", CRON)
    more = ["models:/m/1", "--cron", CRON] if verb == "update" else []
    code, _, err = call("schedule", verb, "nightly", *more)
    assert code == 2 and "no schedule 'nightly'" in err and "weekly" in err and len(server.recurring) == 1


@pytest.mark.parametrize("cron", ["0 3 * * *", "nightly", "", "0 0 3 * * * *", "0 0 3 * * ;", "@every day"])
def test_a_cron_expression_of_five_fields_is_refused(server: KfpServer, call: Any, cron: str) -> None:
    """KFP reads five fields as seconds, minutes, hours, …: 3 o'clock would become every hour."""
    code, _, err = call("schedule", "create", "n", "models:/m/1", "--cron", cron)
    assert code == 2 and "six fields" in err and server.recurring == []
    assert ("did you mean '0 0 3 * * *'" in err) == (cron == "0 3 * * *")


def test_a_long_list_is_sent_to_scan_registry(server: KfpServer, call: Any) -> None:
    code, _, err = call("schedule", "create", "n", *[f"models:/m/{i}" for i in range(21)], "--cron", CRON)
    assert code == 2 and "scan-registry" in err and server.recurring == []
