"""The memory that a repair needs, beside that of one training step of the same network.

    python -m benchmarks.repair_memory [--channels 128,256,256 --side 32]

A DDPM UNet with random weights is trained for one step of as many rows as a repair has (Adam), and repaired for a
few steps with a checkpoint and the average of the weights; each in a process of its own. Counted is what the process
holds at its peak above what it held with torch loaded and the network built, plus the network. Prints a Markdown table
and writes `benchmarks/results/repair_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peak import peak_megabytes
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod
from diffdefend_core.diffusion.training import Training, diffusion_loss
from diffdefend_core.loading.networks import CLASSES, UNet
from diffdefend_core.options import PurificationOptions
from diffdefend_core.purification import Removal, repair
from diffdefend_core.stages.checkpoint import Checkpoint

RESULTS = Path(__file__).parent / "results" / "repair_memory.json"
LEVELS, SIGNALS = 1000, (0.005, 5.0)
GROUPS = 32  # of the network's normalisation
# channels and side: of the first the activations fill the memory, of the last the weights
NETWORKS = (((32, 64), 32), ((128, 256, 256), 32), ((256, 512, 1024), 8))
OPTIONS = PurificationOptions(steps=4, checkpoint_steps=2, own_samples=64)


@dataclass(frozen=True)
class Peaks:
    """The size of a network, and what two ways to train it hold at their peak, in MB (10^6 bytes)."""

    network: float
    step: float
    repair: float

    @property
    def ratio(self) -> float:
        """The memory of a repair over that of one training step."""
        return self.repair / self.step


def untrained(channels: Sequence[int], side: int) -> Denoiser:
    """Return a DDPM with random weights."""
    torch.manual_seed(0)
    network = CLASSES["UNet2DModel"](
        sample_size=side,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        layers_per_block=1,
    )
    levels = Levels.variance_preserving(alphas_cumprod(torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)))
    return DDPM(UNet(network, torch.arange(LEVELS)), levels, shape=(3, side, side)).freeze()


def one_step(model: Denoiser) -> None:
    """Train for one step of as many rows as a repair has."""
    rows = torch.randn(OPTIONS.own_samples, *model.shape)
    loss = diffusion_loss(rows, OPTIONS.removal_batch + OPTIONS.retention_batch)
    Training(model, loss, steps=1, learning_rate=1e-4, generator=torch.Generator().manual_seed(0)).step()


def a_repair(model: Denoiser) -> None:
    """Repair for a few steps, with a checkpoint on disk."""
    rows, removal = torch.randn(OPTIONS.own_samples, *model.shape), Removal(torch.randn(model.shape), SIGNALS)
    with tempfile.TemporaryDirectory() as folder:
        keep = Checkpoint(f"file://{folder}", "state").write
        repair(model, model, [removal], rows, OPTIONS, seed=0, progress=lambda done, total: None, keep=keep)


WAYS: dict[str, Callable[[Denoiser], None]] = {"step": one_step, "repair": a_repair}


def held(way: str, channels: Sequence[int], side: int) -> tuple[float, float]:
    """Return the megabytes of the network, and what this process holds at the peak of a way, the network included."""
    model = untrained(channels, side)
    size = sum(weight.numel() * weight.element_size() for weight in model.network.parameters()) / 1e6
    with torch.no_grad():
        model.noise(torch.zeros(1, *model.shape), torch.zeros(1, dtype=torch.long))
    before = peak_megabytes()
    WAYS[way](model)
    return size, size + peak_megabytes() - before


def in_process(way: str, channels: Sequence[int], side: int) -> tuple[float, float]:
    """Return what `held` says in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.repair_memory", "--way", way]
    command += ["--channels", ",".join(map(str, channels)), "--side", str(side)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    size, peak = json.loads(done.stdout)
    return size, peak


def measured(channels: Sequence[int], side: int) -> Peaks:
    """Return the peaks of both ways."""
    (size, step), (_, repaired) = (in_process(way, channels, side) for way in WAYS)
    return Peaks(size, step, repaired)


def _widths(text: str) -> list[int]:
    widths = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if any(width < 1 or width % GROUPS for width in widths):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected multiples of {GROUPS}, as 128,256")
    return widths


def main() -> None:
    """Measure networks from one that activations fill to one that weights fill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=_widths, metavar="N,N", help="of one network")
    parser.add_argument("--side", type=int, default=32, help="of its images, in pixels")
    parser.add_argument("--way", choices=list(WAYS), help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.way:
        if not arguments.channels:
            parser.error("--way needs --channels")
        print(json.dumps(held(arguments.way, arguments.channels, arguments.side)))
        return
    networks = [(arguments.channels, arguments.side)] if arguments.channels else NETWORKS
    rows = []
    print("| channels | side | network MB | one step MB | repair MB | ratio |\n|---|---|---|---|---|---|")
    for channels, side in networks:
        peaks = measured(channels, side)
        rows.append({"channels": channels, "side": side, **vars(peaks), "ratio": peaks.ratio})
        sizes = f"{peaks.network:.0f} | {peaks.step:.0f} | {peaks.repair:.0f} | {peaks.ratio:.2f}"
        print(f"| {channels} | {side} | {sizes} |", flush=True)
    RESULTS.write_text(json.dumps({"networks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
