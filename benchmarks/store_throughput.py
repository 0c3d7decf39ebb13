"""How fast a folder goes to an S3 server and back through the store adapter, beside the bare minio client.

Both move the same folder of 256 MB, in turn, each in a process of its own. The client uploads with its defaults for
large files (parts of 16 MiB, three at a time) and downloads to a file; the adapter also digests every byte, writes and
verifies the manifest. Ratios within one run, and the peak of resident memory, are what counts.

    python -m benchmarks.store_throughput [--servers rclone,ceph] [--rounds 3]

prints a table and writes benchmarks/results/store_throughput.json. It needs rclone or Ceph, by default whichever of
them is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ceph_server import has_ceph, serving_ceph
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, rclone_program, serving

RESULTS = Path(__file__).parent / "results" / "store_throughput.json"
SIZES = {"model/unet/weights.safetensors": 200 << 20, "model/vae/weights.safetensors": 56 << 20}
PART, PARALLEL = 16 << 20, 3
SERVERS = {"rclone": serving, "ceph": serving_ceph}


def bare(server: S3Server, bucket: str, folder: Path, into: Path) -> tuple[float, float]:
    """Upload and download by the client alone; return the seconds of each."""
    client = server.client
    began = time.monotonic()
    for name in SIZES:
        client.fput_object(bucket, f"bare/{name}", str(folder / name), part_size=PART, num_parallel_uploads=PARALLEL)
    sent = time.monotonic()
    for name in SIZES:
        client.fget_object(bucket, f"bare/{name}", str(into / name))
    return sent - began, time.monotonic() - sent


def adapted(server: S3Server, bucket: str, folder: Path, into: Path) -> tuple[float, float]:
    """Publish and fetch as a stage does; return the seconds of each."""
    from diffdefend_core.io import folders

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    os.environ["DIFFDEFEND_S3_ENDPOINT"] = server.endpoint
    uri = f"s3://{bucket}/load/{time.monotonic_ns()}/"
    began = time.monotonic()
    folders.publish(folder, uri, stage="load", key="k", producer="bench")
    sent = time.monotonic()
    folders.fetch(uri, into)
    return sent - began, time.monotonic() - sent


def measured(work: Callable[..., tuple[float, float]], server: S3Server, folder: Path) -> dict[str, float]:
    """Do the work in a process of its own; return seconds up and down and its peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=folder.parent) as into:
        arguments = (work, server, server.bucket(), folder, Path(into) / "into", sender)
        process = context.Process(target=_report, args=arguments)
        process.start()
        row: dict[str, float] = receiver.recv()
        process.join()
    return row


def _report(
    work: Callable[..., tuple[float, float]], server: S3Server, bucket: str, folder: Path, into: Path, sender: Any
) -> None:
    up, down = work(server, bucket, folder, into)
    sender.send({"up": up, "down": down, "peak_mb": _peak_mb()})


def _peak_mb() -> float:
    """Return the peak of resident memory of this program; `getrusage` would count that of its parent too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def compared(server: S3Server, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of client and adapter, and the ratios of their seconds."""
    rows: dict[str, list[dict[str, float]]] = {"client": [], "adapter": []}
    for _ in range(rounds):
        rows["client"].append(measured(bare, server, folder))
        rows["adapter"].append(measured(adapted, server, folder))
    medians = {
        name: {field: round(statistics.median(row[field] for row in found), 3) for field in found[0]}
        for name, found in rows.items()
    }
    ratios = {field: round(medians["adapter"][field] / medians["client"][field], 3) for field in ("up", "down")}
    return {**medians, "ratio": ratios}


def main() -> int:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    there = [name for name, found in (("rclone", rclone_program()), ("ceph", has_ceph())) if found]
    parser.add_argument("--servers", type=lambda text: text.split(","), default=there, metavar="A,B")
    parser.add_argument("--rounds", type=int, default=3, help="3 rounds fit the 2 GB of Ceph in memory")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    absent = [name for name in given.servers or ["rclone", "ceph"] if name not in there]
    if absent:
        parser.error(f"no {' or '.join(absent)} on this machine; there are: {', '.join(there) or 'none'}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in given.servers:
        with tempfile.TemporaryDirectory(prefix="diffdefend-throughput-") as root:
            folder = Path(root) / "folder"
            for path, size in SIZES.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(os.urandom(size))
            with SERVERS[name](Path(root) / "server") as server:
                found[name] = compared(server, folder, given.rounds)
    given.output.write_text(json.dumps({"rounds": given.rounds, "servers": found}, indent=2) + "\n")
    print("| server | | up, s | down, s | peak, MB |", "|---|---|---|---|---|", sep="\n")
    for name, medians in found.items():
        for who in ("client", "adapter"):
            row = medians[who]
            print(f"| {name} | {who} | {row['up']:.2f} | {row['down']:.2f} | {row['peak_mb']:.0f} |")
        print(f"| {name} | ratio | {medians['ratio']['up']:.2f} | {medians['ratio']['down']:.2f} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
