"""A real MLflow server with basic-auth: what the account of a scan may do, and what only the gate's may."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import free_port

from diffdefend_core.errors import RegistryError
from diffdefend_core.io import registry

pytestmark = [pytest.mark.slow, pytest.mark.mlflow_server]
ADMIN, WORD = "gate", "password-of-the-gate"
READER, READERS_WORD = "scan", "password-of-the-scan"
TAGS = {registry.DIGEST_TAG: "d"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("mlflow's basic-auth needs Flask-WTF: make test-mlflow installs it")
    root, port = tmp_path_factory.mktemp("server"), free_port()
    (root / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{root}/auth.db\n"
        f"admin_username = {ADMIN}\nadmin_password = {WORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MLFLOW_")}
    environment = {
        **kept, "MLFLOW_AUTH_CONFIG_PATH": str(root / "auth.ini"), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the test",
    }  # fmt: skip
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
               "--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{root}/mlflow.db",
               "--artifacts-destination", str(root / "artifacts")]  # fmt: skip
    with (
        (root / "log").open("wb") as log,
        subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, root / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"mlflow server does not answer: {log.read_text()[-2000:]}")


@pytest.fixture
def gate(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    _sign_in(monkeypatch, ADMIN, WORD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return server


def _sign_in(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", word)


def test_the_gate_writes_and_the_account_of_the_scan_only_reads(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server import get_app_client

    version = registry.register_source(gate, "prod", "s3://bucket/model/", TAGS)
    get_app_client("basic-auth", tracking_uri=gate).create_user(READER, READERS_WORD)
    _sign_in(monkeypatch, READER, READERS_WORD)
    assert registry.resolve(gate, f"models:/prod/{version}").source_uri == "s3://bucket/model/"
    for write in (
        lambda: registry.move_alias(gate, "prod", "champion", version),
        lambda: registry.mark(gate, "prod", version, {"diffdefend.verdict": "clean"}),
        lambda: registry.register_source(gate, "prod", "s3://bucket/other/", TAGS),
    ):
        with pytest.raises(RegistryError) as caught:
            write()
        assert "\n" not in str(caught.value) and READERS_WORD not in str(caught.value)
    _sign_in(monkeypatch, ADMIN, WORD)
    assert registry.alias_holder(gate, "prod", "champion") is None
    assert registry.tags_of(gate, "prod", version) == TAGS


def test_a_copy_over_http_names_its_origin_and_keeps_its_place(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `gate promote --to` rests on; the account of the scan may not copy into production."""
    from mlflow.server import get_app_client

    version = registry.register_source(gate, "dev-digits", "s3://bucket/digits/", TAGS)
    assert registry.copy_version(gate, "dev-digits", version, "prod-digits") == ("1", True)
    assert registry.copy_version(gate, "dev-digits", version, "prod-digits") == ("1", False)
    held = registry.version_of(gate, "prod-digits", "1")
    assert (held.source, held.tags) == (f"models:/dev-digits/{version}", TAGS)
    assert registry.download_uri(gate, "prod-digits", "1") == "s3://bucket/digits/"
    assert registry.find_version(gate, "prod-digits", "7") is None
    other = registry.register_source(gate, "dev-digits", "s3://bucket/other/", TAGS)
    accounts = get_app_client("basic-auth", tracking_uri=gate)
    accounts.create_user("copier", READERS_WORD)
    accounts.create_user("stranger", READERS_WORD)
    accounts.grant_user_permission("stranger", "registered_model", "dev-digits", "DENY")
    _sign_in(monkeypatch, "copier", READERS_WORD)
    with pytest.raises(RegistryError):
        registry.copy_version(gate, "dev-digits", other, "prod-digits")
    _sign_in(monkeypatch, "stranger", READERS_WORD)
    assert registry.version_of(gate, "prod-digits", "1").source == f"models:/dev-digits/{version}"
    assert registry.find_version(gate, "dev-digits", version) is None, "one unreadable origin stops no audit"
    with pytest.raises(RegistryError):
        registry.version_of(gate, "dev-digits", version)


def test_a_wrong_password_is_one_line_that_does_not_tell_it(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _sign_in(monkeypatch, ADMIN, "canary-that-is-wrong")
    with pytest.raises(RegistryError) as caught:
        registry.register_source(gate, "other", "s3://bucket/model/", TAGS)
    assert "canary" not in str(caught.value) and "\n" not in str(caught.value)
