"""Publish and fetch stage folders through a proxy that breaks a share of the requests to a real S3 server.

Each operation publishes a folder, fetches one, or reads one file of it. It must succeed with exactly the bytes that
were written, or fail in one line. At the end every folder is fetched once more without the proxy: it must be whole or
be refused. rclone keeps what arrives of a broken upload and compares no digest, so with it some folders are refused
later; Ceph (`--server ceph`) and AWS refuse such an upload at once, and it is tried again.

    python -m benchmarks.fault_injection --operations 1000

prints a table and writes benchmarks/results/fault_injection.json. It needs rclone (`DIFFDEFEND_RCLONE`). The exit code
is 1 if anything was silently wrong, lost, or ended in more than one line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diffdefend_core.artifacts import Manifest
from diffdefend_core.errors import DiffDefendError
from diffdefend_core.io import folders
from tests.ceph_server import serving_ceph
from tests.fault_proxy import FaultProxy, running
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, serving

RESULTS = Path(__file__).parent / "results" / "fault_injection.json"
SIZES = (0, 1, 300, 5_000, 200_000)
PARTS = 17 << 20  # larger than one part of an upload
LARGE_EVERY = 40
SERVERS = {"rclone": serving, "ceph": serving_ceph}


@dataclass
class Outcome:
    """What became of the operations. `silent` and `unclear` must stay empty.

    `later` are folders that were published through a fault and are refused by those who read them.
    """

    operations: int = 0
    succeeded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    longest: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not (self.silent or self.unclear)


@dataclass(frozen=True)
class Written:
    """A folder that was published, or was tried to be."""

    uri: str
    source: Path
    manifest: Manifest | None


def go(
    server: S3Server, *, operations: int, rate: float, seed: int, root: Path, large: bool = True
) -> tuple[Outcome, FaultProxy]:
    """Do so many operations through the proxy; return what became of them and what the proxy did."""
    draws, outcome = random.Random(seed), Outcome()
    bucket = server.bucket()
    proxy = FaultProxy(server.endpoint.removeprefix("http://"), rate=rate, seed=seed)
    written: list[Written] = []
    with running(proxy) as endpoint:
        for number in range(operations):
            os.environ["DIFFDEFEND_S3_ENDPOINT"] = endpoint
            began = time.monotonic()
            if number % 4 == 0 or not written:
                size = PARTS if large and number % LARGE_EVERY == 0 else draws.choice(SIZES)
                written.append(_publish(f"s3://{bucket}/load/{number}/", root / str(number), size, draws, outcome))
            else:
                _read(draws.choice(written), root / "into" / str(number), draws, outcome)
            outcome.longest = max(outcome.longest, time.monotonic() - began)
            outcome.operations += 1
    os.environ["DIFFDEFEND_S3_ENDPOINT"] = server.endpoint
    for item in written:
        _look_again(item, root / "after" / item.source.name, outcome)
    return outcome, proxy


def _publish(uri: str, source: Path, size: int, draws: random.Random, outcome: Outcome) -> Written:
    (source / "model").mkdir(parents=True)
    (source / "record.json").write_bytes(draws.randbytes(100))
    (source / "model" / "weights.bin").write_bytes(draws.randbytes(size))
    try:
        manifest = folders.publish(source, uri, stage="load", key="k", producer="bench")
    except DiffDefendError as error:
        _failed(error, outcome)
        return Written(uri, source, None)
    except Exception as error:
        outcome.unclear.append(f"publish: {type(error).__name__}: {error}")
        return Written(uri, source, None)
    outcome.succeeded += 1
    if manifest.files != folders.digest_files(source):
        outcome.silent.append(f"{uri}: the manifest that publish returns is another")
    return Written(uri, source, manifest)


def _read(item: Written, into: Path, draws: random.Random, outcome: Outcome) -> None:
    try:
        if draws.random() < 0.5:
            folders.fetch(item.uri, into)
            found = folders.digest_files(into)
        else:
            content = folders.read_file(item.uri, "record.json")
            into.mkdir(parents=True)
            (into / "record.json").write_bytes(content)
            found = folders.digest_files(into)
    except DiffDefendError as error:
        _failed(error, outcome)
        return
    except Exception as error:
        outcome.unclear.append(f"read: {type(error).__name__}: {error}")
        return
    outcome.succeeded += 1
    if not set(found) <= set(folders.digest_files(item.source)):
        outcome.silent.append(f"{item.uri}: other bytes were read than were written")


def _failed(error: DiffDefendError, outcome: Outcome) -> None:
    outcome.failures[type(error).__name__] += 1
    if "\n" in str(error) or SECRET_KEY in str(error):
        outcome.unclear.append(str(error))


def _look_again(item: Written, into: Path, outcome: Outcome) -> None:
    try:
        found = folders.fetch(item.uri, into)
    except DiffDefendError as error:
        if item.manifest is not None:
            outcome.later.append(str(error))
        return
    if found.files != folders.digest_files(item.source):
        outcome.silent.append(f"{item.uri}: the store holds other bytes than were written")


def table(outcome: Outcome, proxy: FaultProxy) -> str:
    """Return what the proxy did and what became of it as Markdown."""
    rows = [f"| {name} | {count} |" for name, count in sorted(proxy.seen.items())]
    failures = ", ".join(f"{count} {name}" for name, count in sorted(outcome.failures.items())) or "none"
    return "\n".join([
        "| the proxy's fault | requests |", "|---|---|", *rows, "",
        f"operations: {outcome.operations}; done: {outcome.succeeded}; refused in one line: {failures}",
        f"silently wrong: {len(outcome.silent)}; not one clear line: {len(outcome.unclear)}; "
        f"published and refused later: {len(outcome.later)}",
        f"longest operation: {outcome.longest:.1f} s", *outcome.silent, *outcome.unclear,
    ])  # fmt: skip


def main() -> int:
    """Start the server, do the operations, print and write what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.15, help="share of requests that meet a fault")
    parser.add_argument("--server", choices=tuple(SERVERS), default="rclone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with (
        tempfile.TemporaryDirectory(prefix="diffdefend-faults-") as root,
        SERVERS[given.server](Path(root) / "s3") as server,
    ):
        outcome, proxy = go(server, operations=given.operations, rate=given.rate, seed=given.seed, root=Path(root))
    fields = {**vars(outcome), "server": given.server, "faults": proxy.seen, "rate": given.rate, "seed": given.seed}
    kept = json.loads(given.output.read_text()) if given.output.is_file() else {}
    given.output.write_text(json.dumps({**kept, given.server: fields}, indent=2, sort_keys=True) + "\n")
    print(table(outcome, proxy))
    return 0 if outcome.kept else 1


if __name__ == "__main__":
    sys.exit(main())
