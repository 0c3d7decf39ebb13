"""What a scan takes on a GPU, for a network of the size of latent diffusion on faces.

    python -m benchmarks.gpu_scan [--tiny] [--passes] [float32] [channels-last] [amp+channels-last+compile] ...

A UNet2DModel with random weights, 1000 levels of the scaled-linear schedule and latents of 3x64x64 is searched, and
painted with what was found, with the default options: in float32, or in each of the named ways. Prints a Markdown
table and writes `benchmarks/results/gpu_scan.json`. Without a GPU nothing is measured, unless `--tiny` asks for a tiny
network on the CPU, which writes nothing.

TFLOP/s is the arithmetic of one forward pass times the counted evaluations, over the seconds. It is an upper bound:
forward and backward count as 3 forward passes, but where only the input needs a gradient there is less to compute; the
table says how much. Seconds include the compilation, which is done anew for batches of another size and for the twin.
The shares of the search and of the painting are given too.

`--passes` times single passes instead, after the first one of each kind: forward and backward with the rows of an
iteration of the search, and forward with the rows of a batch of images. They are `passes` in the same file, and scans
`scans`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peak import peak_megabytes
from diffdefend_core.detection import measure
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.families.ldm import LatentDiffusion
from diffdefend_core.diffusion.levels import Levels, alphas_cumprod
from diffdefend_core.inversion import invert
from diffdefend_core.loading.networks import CLASSES, UNet
from diffdefend_core.options import DetectionOptions, InversionOptions
from diffdefend_core.progress import Progress, reporting, silent

RESULTS = Path(__file__).parent / "results" / "gpu_scan.json"
LEVELS, BETAS = 1000, (0.0015, 0.0195)
SEARCHED, PAINTED = 2 * InversionOptions().pairs, 16  # rows of an iteration of the search, and of a batch of images
LARGE: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 32,
}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# random weights denoise nothing, which is refused elsewhere
ANYTHING = 1e9
TINY_OPTIONS = InversionOptions(
    worst_error=ANYTHING,
    own_samples=4,
    own_steps=2,
    twin_steps=1,
    twin_batch=2,
    race_iterations=6,
    iterations=6,
    pairs=1,
    probe_pairs=1,
)


PLAIN = "float32"
TINY_PAINTING = DetectionOptions(samples=2, rms=(1.0,), stochastic_steps=2, deterministic_steps=2)
TIMED = 1.0  # seconds that a pass is repeated for
SCAN_HEADS = (
    "way | seconds | search | painting | peak MB | evaluations | GFLOP forward | GFLOP with backward | TFLOP/s, at most"
)
PASS_HEADS = "way | first, s | search, ms | TFLOP/s | painting, ms | TFLOP/s"
Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How the network is computed: bfloat16 autocast, channels last, compiled; none of them is float32 as it is."""

    amp: bool = False
    channels_last: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        """The name in the table."""
        chosen = [name.replace("_", "-") for name, on in asdict(self).items() if on]
        return "+".join(chosen) or PLAIN

    @classmethod
    def named(cls, name: str) -> Way:
        """Return the way of that name. Raises argparse.ArgumentTypeError for an unknown one."""
        parts = [] if name == PLAIN else name.replace("-", "_").split("+")
        known = [item.name for item in fields(cls)]
        if not set(parts) <= set(known):
            some = ", ".join(known).replace("_", "-")
            raise argparse.ArgumentTypeError(f"found {name!r}; expected {PLAIN}, or some of {some} with +")
        return cls(**dict.fromkeys(parts, True))


class Computed(nn.Module):
    """A network that is computed in some way; input and output [N, C, H, W] stay float32 and in the usual layout."""

    def __init__(self, network: nn.Module, way: Way) -> None:
        super().__init__()
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self.network, self.way = network.to(memory_format=layout), way  # type: ignore[call-overload]
        self._compile()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()  # a copy of a compiled network, such as the twin, is not compiled

    def _compile(self) -> None:
        if self.way.compile:
            self.network.compile()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the output of the network for x [N, C, H, W] at level indices t [N]."""
        if self.way.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.way.amp):
            output: Tensor = self.network(x, t)
        return output.float().contiguous()


class Nothing:
    """No autoencoder: a search stays among latents."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Return what is given."""
        return pictures

    def decode(self, latents: Tensor) -> Tensor:
        """Return what is given."""
        return latents


def denoiser(way: Way, device: str, network: dict[str, Any]) -> Denoiser:
    """Return a latent diffusion model with random weights, frozen, on `device`; the same for every way."""
    torch.manual_seed(0)
    unet = UNet(CLASSES["UNet2DModel"](**network), torch.arange(LEVELS)).to(device)
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, LEVELS, dtype=torch.float64)
    levels = Levels.variance_preserving(alphas_cumprod(roots**2))
    size = network["sample_size"]
    shape = (3, size, size)
    return LatentDiffusion(Computed(unet, way), levels, Nothing(), shape=shape, picture_shape=shape).freeze()


def flops(model: Denoiser) -> tuple[int, int]:
    """Return the floating-point operations of one sample: forward, and forward with the gradient of the input."""
    t = torch.full((1,), LEVELS // 2, device=model.device)
    x = torch.zeros((1, *model.shape), device=model.device)
    counted = []
    for gradient in (False, True):
        with FlopCounterMode(display=False) as counter:
            answer = model.noise(x.requires_grad_(gradient), t)
            if gradient:
                answer.sum().backward()  # type: ignore[no-untyped-call]
        counted.append(counter.get_total_flops())
    return counted[0], counted[1]


def measured(
    way: Way,
    device: str,
    network: dict[str, Any],
    options: InversionOptions,
    painting: DetectionOptions,
    progress: Progress,
) -> Row:
    """Return what the scan of one model takes: `seconds`, `peak_mb` of the device and `tflops_per_second`."""
    forward, both = flops(denoiser(Way(), device, network))
    model, on_gpu = denoiser(way, device, network), device != "cpu"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    found = invert(model, "0" * 64, options, seed=0, progress=progress)
    if on_gpu:
        torch.cuda.synchronize()
    searched = time.monotonic() - began
    painted = measure(model, found.record, found.triggers, painting, seed=1, progress=progress)
    seconds = time.monotonic() - began  # the images are on the CPU by now
    spent = found.record.forward_equivalents + painted.forward_equivalents
    return {
        "way": way.name,
        "seconds": round(seconds, 2),
        "search": round(searched, 2),
        "painting": round(seconds - searched, 2),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_megabytes(), 1),
        "forward_equivalents": spent,
        "gflop_forward": round(forward / 1e9, 3),
        "gflop_forward_and_backward": round(both / 1e9, 3),
        "tflops_per_second": round(forward * spent / seconds / 1e12, 4),
    }


def answer(model: Denoiser, x: Tensor, t: Tensor) -> None:
    """Make one pass over x [N, C, H, W] at levels t [N], and back to x if that needs a gradient."""
    with torch.set_grad_enabled(x.requires_grad):
        noise = model.noise(x, t)
        if x.requires_grad:
            torch.autograd.grad(noise.square().mean(), x)


def timed_pass(model: Denoiser, rows: int, *, gradient: bool) -> tuple[float, float]:
    """Return the seconds of the first pass over so many rows, compilation included, and the median of further ones."""
    t = torch.full((rows,), LEVELS // 2, device=model.device)
    x = torch.randn((rows, *model.shape), device=model.device).requires_grad_(gradient)
    began = time.monotonic()
    answer(model, x, t)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    first = time.monotonic() - began
    timer = Timer("answer(model, x, t)", globals={"answer": answer, "model": model, "x": x, "t": t})
    return first, timer.blocked_autorange(min_run_time=TIMED).median


def timed_passes(way: Way, device: str, network: dict[str, Any]) -> Row:
    """Return the medians of single passes, and the seconds of the first pass of each kind, compilation included."""
    forward, both = flops(denoiser(Way(), device, network))
    model = denoiser(way, device, network)
    first_searched, searched = timed_pass(model, SEARCHED, gradient=True)
    first_painted, painted = timed_pass(model, PAINTED, gradient=False)
    return {
        "way": way.name,
        "first": round(first_searched + first_painted, 2),
        "search_ms": round(1000 * searched, 2),
        "search_tflops_per_second": round(both * SEARCHED / searched / 1e12, 3),
        "painting_ms": round(1000 * painted, 2),
        "painting_tflops_per_second": round(forward * PAINTED / painted / 1e12, 3),
    }


def table(rows: Sequence[Row], heads: str) -> str:
    """Return the rows as Markdown under `heads`, separated by |."""
    lines = [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows])


def device_facts(device: str) -> dict[str, Any]:
    """Return what the figures were measured on; `tf32` says whether float32 convolutions and products use it."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "torch": torch.__version__,
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
    }


def write(kind: str, rows: Sequence[Row], device: str) -> None:
    """Put the rows of one kind into the results; the others stay."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content = {**known, kind: {**device_facts(device), "rows": rows}}
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ways", nargs="*", type=Way.named, default=[Way()], help="float32, or amp (bfloat16) and others"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU, with few iterations")
    parser.add_argument("--passes", action="store_true", help="time single passes instead of whole scans")
    chosen = parser.parse_args(arguments)
    if not chosen.tiny and not torch.cuda.is_available():
        print("gpu_scan: there is no GPU, nothing is measured; --tiny runs a tiny network on the CPU", file=sys.stderr)
        return 0
    device = "cpu" if chosen.tiny else "cuda"
    network, options = (TINY, TINY_OPTIONS) if chosen.tiny else (LARGE, InversionOptions(worst_error=ANYTHING))
    painting = TINY_PAINTING if chosen.tiny else DetectionOptions()
    kind, heads = ("passes", PASS_HEADS) if chosen.passes else ("scans", SCAN_HEADS)
    rows: list[Row] = []
    with reporting(quiet=chosen.tiny) as progress:
        report = progress or silent
        for way in chosen.ways:
            if chosen.passes:
                rows.append(timed_passes(way, device, network))
            else:
                rows.append(measured(way, device, network, options, painting, report))
            if not chosen.tiny:
                write(kind, rows, device)
    print(table(rows, heads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
