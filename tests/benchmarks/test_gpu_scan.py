"""The benchmark of a search on a GPU, with a tiny network on the CPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_scan
from benchmarks.gpu_scan import LARGE, TINY, Computed, Way, denoiser, flops, main


def test_a_tiny_scan_is_measured_in_each_of_the_named_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "float32", "amp+channels-last"]) == 0
    heads, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [line[0] for line in cells] == ["float32", "amp+channels-last"]
    assert all(len(line) == heads.count("|") - 1 for line in cells)
    assert cells[0][5] == cells[1][5] and float(cells[0][5]) > 0  # the search does not depend on the way
    assert all(float(line[1]) > 0 for line in cells)


def test_single_passes_are_timed_in_each_of_the_named_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--passes", "float32", "channels-last"]) == 0
    heads, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [line[0] for line in cells] == ["float32", "channels-last"]
    for line in cells:
        assert len(line) == heads.count("|") - 1
        assert float(line[2]) > float(line[4]) > 0, "a pass of 12 rows and back takes longer than one of 16"


def test_what_is_written_leaves_the_other_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_scan, "RESULTS", tmp_path / "gpu_scan.json")
    gpu_scan.write("scans", [{"way": "float32"}], "cpu")
    gpu_scan.write("passes", [{"way": "amp"}], "cpu")
    written = json.loads(gpu_scan.RESULTS.read_text())
    assert [written[kind]["rows"][0]["way"] for kind in ("scans", "passes")] == ["float32", "amp"]
    assert written["passes"]["device"] == "cpu"


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "there is no GPU" in said.err


def test_an_unknown_way_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny", "amp+magic"])
    assert "found 'amp+magic'; expected float32, or some of amp, " in capsys.readouterr().err


def test_every_way_computes_the_same_network() -> None:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 999])
    plain, *others = (denoiser(way, "cpu", TINY).noise(x, t) for way in (Way(), Way(amp=True), Way(channels_last=True)))
    for answer in others:
        assert answer.dtype == torch.float32 and answer.is_contiguous()
        torch.testing.assert_close(answer, plain, rtol=0.05, atol=0.05)
    assert not torch.equal(others[0], plain)


def test_a_copy_of_a_compiled_network_is_compiled_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    network = Computed(torch.nn.Linear(2, 2), Way(compile=True))
    twin = copy.deepcopy(network)
    assert compiled[0] is network.network and compiled[1] is twin.network is not network.network


def test_the_gradient_of_the_input_costs_less_than_twice_a_forward_pass() -> None:
    forward, both = flops(denoiser(Way(), "cpu", TINY))
    assert 1.5 * forward < both < 3 * forward


def test_the_large_network_is_that_of_latent_diffusion() -> None:
    with torch.device("meta"):
        network = gpu_scan.CLASSES["UNet2DModel"](**LARGE)
    assert sum(value.numel() for value in network.parameters()) == pytest.approx(274e6, rel=0.01)
