"""Time the guard on one noise of 3x256x256, beside plain operations on the same numbers.

    python -m benchmarks.guard [--repetitions N] [--threads N]

Prints a Markdown table of median and 95th percentile. The rows take turns, so that whatever else runs on the machine
slows all of them alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffdefend_core.detection.guard import Guard, noise_tests

SHAPE = (3, 256, 256)
WARM_UP = 20


def operations(noise: Tensor, trigger: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed by name: the guards on noise [1, C, H, W], and two baselines."""
    row, flat, half = noise.flatten(), trigger.flatten(), noise.half()
    gamma = torch.full(trigger.shape, 0.6)
    gamma[..., :16, :16] = 0.1
    matched = Guard.matched(trigger, 1e-3)
    scalar, pixels = Guard.likelihood(trigger, 0.6), Guard.likelihood(trigger, gamma)
    return {
        "baseline: torch.dot": lambda: torch.dot(row, flat),
        "baseline: noise * 2": lambda: noise * 2,
        "matched filter, float32": lambda: matched(noise),
        "matched filter, float16": lambda: matched(half),
        "likelihood ratio, one gamma": lambda: scalar(noise),
        "likelihood ratio, gamma per pixel": lambda: pixels(noise),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def timed(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Tensor]:
    """Return the wall times [repetitions] of each call in microseconds."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    rounds = [[seconds(call) for call in calls.values()] for _ in range(repetitions)]
    return dict(zip(calls, torch.tensor(rounds, dtype=torch.float64).T * 1e6, strict=True))


def table(times: dict[str, Tensor]) -> str:
    """Return median and 95th percentile as Markdown."""
    lines = ["| operation | median, us | 95 %, us |", "|---|---|---|"]
    lines += [f"| {name} | {item.median():.0f} | {item.quantile(0.95):.0f} |" for name, item in times.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    noise, trigger = torch.randn(1, *SHAPE, generator=generator), torch.rand(SHAPE, generator=generator) - 0.5
    print(table(timed(operations(noise, trigger), arguments.repetitions)))
    print()
    print(table(timed({"noise tests, without a trigger": lambda: noise_tests(noise)}, 20)))


if __name__ == "__main__":
    main()
