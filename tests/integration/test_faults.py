"""The store behind a connection that breaks: what was written comes back, or one line says why not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from s3_server import S3Server

from benchmarks.fault_injection import go
from diffdefend_core.errors import StoreError
from diffdefend_core.io import folders
from tests.fault_proxy import FAULTS, FaultProxy, running

pytestmark = pytest.mark.s3


def proxy_of(server: S3Server, fault: str, rate: float = 1.0, seed: int = 0) -> FaultProxy:
    return FaultProxy(server.endpoint.removeprefix("http://"), rate=rate, faults=(fault,), seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    root.mkdir()
    (root / "a.bin").write_bytes(bytes(range(256)) * 100)
    return root


def publish(folder: Path, uri: str) -> None:
    folders.publish(folder, uri, stage="load", key="k", producer="test")


def test_sixty_operations_over_a_broken_connection_are_never_silently_wrong(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", s3_environment.endpoint)  # to be put back afterwards
    outcome, proxy = go(s3_environment, operations=60, rate=0.15, seed=5, root=tmp_path, large=False)
    assert (outcome.silent, outcome.unclear) == ([], [])
    assert outcome.operations == 60 and outcome.succeeded > 30
    # servers are asked more or less often, so that one of the faults may not have had its turn
    assert len(set(FAULTS) & set(proxy.seen)) >= len(FAULTS) - 1, proxy.seen


@pytest.mark.parametrize("fault", ["drop before", "drop after", "delay", "truncate answer", "503 SlowDown", "500"])
def test_a_fault_that_passes_is_not_noticed(
    s3_environment: S3Server, folder: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = s3_environment.bucket(), proxy_of(s3_environment, fault, rate=0.2, seed=3)
    with running(proxy) as endpoint:
        monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", endpoint)
        for number in range(3):
            publish(folder, f"s3://{bucket}/{number}/")
            folders.fetch(f"s3://{bucket}/{number}/", tmp_path / str(number))
            assert (tmp_path / str(number) / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()
    assert proxy.seen[fault] > 0


@pytest.mark.parametrize(
    ("fault", "tries", "words"),
    [
        ("503 SlowDown", (5, 10), ("SlowDown", "run the stage again")),
        ("drop before", (5, 10), ("cannot be reached", "check DIFFDEFEND_S3_ENDPOINT")),
        ("expired credentials", (1, 1), ("ExpiredToken", "fetch new credentials")),
    ],
)
def test_a_fault_that_stays_ends_in_one_line_after_a_bounded_number_of_tries(
    s3_environment: S3Server, fault: str, tries: tuple[int, int], words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy = proxy_of(s3_environment, fault)
    with running(proxy) as endpoint:
        monkeypatch.setenv("DIFFDEFEND_S3_ENDPOINT", endpoint)
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            folders.read_manifest("s3://bucket/a/")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert tries[0] <= proxy.seen[fault] <= tries[1]
    assert time.monotonic() - began < 60


def test_credentials_that_expire_in_the_middle_leave_an_unfinished_folder(
    s3_environment: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{s3_environment.bucket()}/a/"
    proxy = proxy_of(s3_environment, "expired credentials", rate=0.0)
    put = folders._put_manifest

    def expire(*arguments: object) -> object:
        proxy.rate = 1.0
        return put(*arguments)

    with running(proxy) as endpoint, monkeypatch.context() as patch:
        patch.setenv("DIFFDEFEND_S3_ENDPOINT", endpoint)
        patch.setattr(folders, "_put_manifest", expire)
        with pytest.raises(StoreError, match="ExpiredToken"):
            publish(folder, uri)
    assert folders.read_manifest(uri) is None
    publish(folder, uri)
    assert folders.read_manifest(uri) is not None
