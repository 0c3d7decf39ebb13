"""The S3 adapter against a real server: large files, refusals, silence, and no secret in any message."""

import os
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, free_port

from diffdefend_core.errors import InputError, StoreError
from diffdefend_core.io import folders
from diffdefend_core.io.s3 import S3Store
from diffdefend_core.io.store import MissingObjectError

pytestmark = pytest.mark.s3


def publish(folder: Path, uri: str) -> None:
    folders.publish(folder, uri, stage="load", key="k", producer="test", parents=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    root.mkdir()
    (root / "a.json").write_bytes(b"{}")
    return root


def check(caught: pytest.ExceptionInfo[StoreError], *words: str) -> None:
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and SECRET_KEY not in "".join(traceback.format_exception(caught.value))


def test_a_multipart_file_comes_back_whole(s3_environment: S3Server, tmp_path: Path, folder: Path) -> None:
    (folder / "big.bin").write_bytes(os.urandom(40 << 20))
    uri = f"s3://{s3_environment.bucket()}/a/b/"
    publish(folder, uri)
    folders.fetch(uri, tmp_path / "into")
    assert (tmp_path / "into/big.bin").read_bytes() == (folder / "big.bin").read_bytes()


def test_a_prefix_does_not_match_its_siblings(s3_environment: S3Server, tmp_path: Path, folder: Path) -> None:
    bucket = s3_environment.bucket()
    publish(folder, f"s3://{bucket}/run")
    (folder / "b.json").write_bytes(b"{}")
    publish(folder, f"s3://{bucket}/run-2")
    folders.fetch(f"s3://{bucket}/run", tmp_path / "into")
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["a.json"]


def test_a_wrong_secret_is_refused_at_once(
    s3_environment: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{s3_environment.bucket()}/a/"
    publish(folder, uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY[:-1] + "X")
    start = time.monotonic()
    with pytest.raises(StoreError) as caught:
        folders.read_manifest(uri)
    assert time.monotonic() - start < 1
    check(caught, uri, s3_environment.endpoint, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")
    assert SECRET_KEY[:-1] not in "".join(traceback.format_exception(caught.value))


def test_an_unknown_access_key_is_refused(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError) as caught:
        S3Store(s3_environment.bucket()).entries("")
    check(caught, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID")


def test_a_missing_bucket_is_not_an_unfinished_folder(s3_environment: S3Server, folder: Path) -> None:
    for call in (
        lambda: folders.read_manifest("s3://no-such-bucket/a/"),
        lambda: publish(folder, "s3://no-such-bucket/a/"),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        check(caught, "no-such-bucket", "NoSuchBucket", "create the bucket")
        assert not isinstance(caught.value, MissingObjectError)


@pytest.mark.parametrize("bucket", ["a", "a b", "a..b"])
def test_an_impossible_bucket_name_is_an_input_error(s3_environment: S3Server, bucket: str) -> None:
    with pytest.raises(InputError):
        folders.read_manifest(f"s3://{bucket}/a/")


def test_a_closed_port_fails_within_ten_seconds(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    with pytest.raises(StoreError) as caught:
        folders.read_manifest("s3://bucket/a/")
    assert time.monotonic() - start < 10
    check(caught, "s3://bucket/a/manifest.json", "127.0.0.1", "refused", "DIFFDEFEND_S3_ENDPOINT")


def test_an_endpoint_that_never_accepts_fails_within_ten_seconds(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listening socket whose queue is full drops connections silently, as a firewall does."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
            fillers.append(filler)
        monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StoreError) as caught:
            folders.read_manifest("s3://bucket/a/")
        assert time.monotonic() - start < 10
        for filler in fillers:
            filler.close()
    check(caught, "no answer within 3 s")


def test_tls_against_a_plain_server_is_not_retried(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", s3_environment.endpoint.replace("http:", "https:"))
    with pytest.raises(StoreError) as caught:
        folders.read_manifest("s3://bucket/a/")
    check(caught, "TLS")


@pytest.mark.parametrize(
    "text",
    ["localhost:9000", "http://user:hidden-word@host", "http://host/path", "ftp://host", "http://[::1", "http://a b"],
)
def test_a_malformed_endpoint_is_named_but_not_echoed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", text)
    with pytest.raises(InputError, match="DIFFDEFEND_S3_ENDPOINT is not an endpoint URL") as caught:
        S3Store("bucket")
    assert "hidden-word" not in str(caught.value)


def test_missing_credentials_are_named(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match="AWS_SECRET_ACCESS_KEY not set"):
        S3Store("bucket")


class Stumbling(BaseHTTPRequestHandler):
    """Answers 503 SlowDown, then cuts the body after half of it, then serves the range that is asked for."""

    body = bytes(range(256)) * 8192
    requests: tuple[str | None, ...] = ()

    def do_GET(self) -> None:
        """Serve one request, worse the earlier it comes."""
        wanted = self.headers.get("Range")
        Stumbling.requests = (*Stumbling.requests, wanted)
        if len(Stumbling.requests) == 1:
            return self._answer(503, b"<Error><Code>SlowDown</Code></Error>", 0)
        if len(Stumbling.requests) == 2:
            return self._answer(200, self.body, len(self.body) // 2)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        return self._answer(206, self.body[start:], 0)

    def _answer(self, status: int, body: bytes, cut: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def test_a_slow_and_breaking_server_is_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stumbling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    try:
        assert b"".join(S3Store("bucket").read("key")) == Stumbling.body
    finally:
        server.shutdown()
        server.server_close()
    assert len(Stumbling.requests) == 3 and Stumbling.requests[2] is not None
