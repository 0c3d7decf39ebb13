"""How fast a folder goes to an S3 server and back through the store adapter, beside the bare minio client.

Both move the same folder of 256 MB, in turn, each in a process of its own. The client uploads with its defaults for
large files (parts of 16 MiB, three at a time) and downloads to a file; the adapter also digests every byte, writes and
verifies the manifest. Ratios within one run, and the peak of resident memory, are what counts.

    python -m benchmarks.store_throughput

prints a table and writes benchmarks/results/store_throughput.json. It needs rclone.
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

from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, serving

RESULTS = Path(__file__).parent / "results" / "store_throughput.json"
SIZES = {"model/unet/weights.safetensors": 200 << 20, "model/vae/weights.safetensors": 56 << 20}
PART, PARALLEL = 16 << 20, 3


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


def main() -> int:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"client": [], "adapter": []}
    with tempfile.TemporaryDirectory(prefix="diffdefend-throughput-") as root, serving(Path(root) / "s3") as server:
        folder = Path(root) / "folder"
        for name, size in SIZES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(os.urandom(size))
        for _ in range(given.rounds):
            rows["client"].append(measured(bare, server, folder))
            rows["adapter"].append(measured(adapted, server, folder))
    medians = {
        name: {field: round(statistics.median(row[field] for row in found), 3) for field in found[0]}
        for name, found in rows.items()
    }
    ratios = {field: round(medians["adapter"][field] / medians["client"][field], 3) for field in ("up", "down")}
    given.output.write_text(json.dumps({"rounds": given.rounds, "ratio": ratios, **medians}, indent=2) + "\n")
    print("| | up, s | down, s | peak, MB |", "|---|---|---|---|", sep="\n")
    for name, row in medians.items():
        print(f"| {name} | {row['up']:.2f} | {row['down']:.2f} | {row['peak_mb']:.0f} |")
    print(f"| ratio | {ratios['up']:.2f} | {ratios['down']:.2f} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
