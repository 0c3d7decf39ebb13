"""`diffdefend list` and `diffdefend attack`, on a real model of the zoo: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffdefend_core.attacks.plans import ATTACKS
from diffdefend_core.cli import run_command
from diffdefend_core.diffusion.generate import generate
from diffdefend_core.loading.build import load_denoiser
from diffdefend_core.scope import NOT_COVERED
from diffdefend_core.stages import attack as stage
from zoo.build import HERE
from zoo.data import digits_data

PUBLISHED = [
    "DDPM-SCHED", "DDIM-SCHED", "DPM_SOLVER_O1", "DPM_SOLVER_O2", "DPM_SOLVER_O3", "DPM_SOLVER_PP_O1",
    "DPM_SOLVER_PP_O2", "DPM_SOLVER_PP_O3", "UNIPC", "PNDM", "DEIS", "HEUN", "SCORE-SDE-VE",
]  # fmt: skip
FAMILIES = {"ddpm": "vp", "ncsn": "ve", "ldm": "vp", "flow": "flow", "consistency": "consistency"}
BASE = str(HERE / "base-a")
ERROR = "diffdefend: error: "


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[dict[str, Any]]]:
    """Run `list KIND -o json`; return its rows."""

    def listed(kind: str) -> list[dict[str, Any]]:
        assert run_command(["list", kind, "-o", "json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        rows: list[dict[str, Any]] = json.loads(out)
        return rows

    return listed


def test_the_thirteen_published_samplers_come_first_and_in_order(listed: Callable[..., Any]) -> None:
    rows = listed("samplers")
    assert [row["name"] for row in rows][:13] == PUBLISHED
    assert {"LMSD", "EDM-VE-SDE", "EDM-VE-ODE", "EULER", "CONSISTENCY"} <= {row["name"] for row in rows[13:]}
    steps = {row["name"]: row["steps"] for row in rows}
    assert [steps[name] for name in PUBLISHED] == [1000, 50, *[20] * 7, 50, 20, 50, 1000]
    kinds = {row["name"]: row["stochastic"] for row in rows}
    assert [name for name in PUBLISHED if kinds[name]] == ["DDPM-SCHED", "SCORE-SDE-VE"]
    assert {row["name"]: row["processes"] for row in rows}["SCORE-SDE-VE"] == ["ve"]
    assert all(row["source"] for row in rows)


def test_every_family_is_listed_with_what_it_is_read_from(listed: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in listed("families") if row["process"] != "adapter"}
    assert {name: row["process"] for name, row in rows.items()} == FAMILIES
    assert "DDPMPipeline" in rows["ddpm"]["pipelines"] and "DDPMScheduler" in rows["ddpm"]["schedulers"]
    assert rows["ncsn"]["schedulers"] == ["ScoreSdeVeScheduler"]


def test_the_attacks_say_what_is_covered_and_what_is_not(listed: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in listed("attacks")}
    assert [name for name, row in rows.items() if row["in_scope"]] == list(ATTACKS)
    assert [name for name, row in rows.items() if not row["in_scope"]] == [name for name, _ in NOT_COVERED]
    gungnir = rows["gungnir"]
    assert gungnir["source"].startswith("not covered: a style of the input picture") and gungnir["processes"] == []
    assert rows["trojdiff-in-d2d-patch"]["paints"] == "class"


def test_the_methods_name_their_source(listed: Callable[..., Any]) -> None:
    rows = {row["name"]: row["source"] for row in listed("methods")}
    assert rows["diffdefend"].startswith("ours")


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("families", ["name", "process", "ncsn", "ScoreSdeVePipeline", "consistency"]),
        ("samplers", [*PUBLISHED, "Karras et al. 2022", "yes", "no"]),
        ("attacks", ["baddiffusion", "gungnir", "not covered: a style of the input picture", "VillanDiffusion"]),
        ("methods", ["diffdefend", "ours"]),
    ],
)
def test_a_table_holds_the_same(kind: str, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["list", kind]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    for text in texts:
        assert text in out


def test_an_unknown_kind_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["list", "models"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(ERROR) and err.count("\n") == 1 and "attacks" in err


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what the command line leaves at its defaults small."""
    monkeypatch.setitem(stage.AttackOptions.__init__.__kwdefaults__, "own_samples", 8)
    monkeypatch.setitem(stage.AttackOptions.__init__.__kwdefaults__, "asr_samples", 2)


@pytest.fixture
def unfired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the success of an attack that takes hundreds of steps to fire: nothing here looks at it."""
    monkeypatch.setattr(stage, "fire", lambda denoiser, *_, **__: torch.zeros(2, *denoiser.shape))


def attack(*flags: str, method: str = "villan-ode", to: str = "out", source: str = BASE) -> int:
    return run_command(
        ["attack", source, "--method", method, "--to", to, "--steps", "2", "--store", f"file://{Path.cwd()}/store",
         "--device", "cpu", "--quiet", *flags]
    )  # fmt: skip


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_planted_model_is_written_with_its_backdoor_and_a_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack("--seed", "4", "--poison-rate", "0.5", "--trigger", "stripes", "--target", "hat") == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == f"diffdefend: warning: {stage.WARNING}"
    assert "villan-ode planted in out/model, fires with DDIM-SCHED, attack success 0% (before: 0%)" in out
    written = contents(tmp_path / "out")
    assert {name for name in written if "/" not in name} == {"backdoor.safetensors", "card.json"}
    assert {f"model/{name}" for name in contents(Path(BASE)) - {"README.md"}} <= written
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["out"]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["warning"] == stage.WARNING and card["source"] == BASE and card["seed"] == 4
    assert (card["method"], card["trigger"], card["target"]) == ("villan-ode", "stripes", "hat")
    assert (card["steps"], card["poison_rate"], card["family"], card["sampler"]) == (2, 0.5, "ddpm", "DDIM-SCHED")
    assert card["asr"] == card["asr_before"] == 0


def test_a_planted_model_is_another_one_that_the_scanner_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert attack() == 0
    before, after = load_denoiser(Path(BASE)), load_denoiser(tmp_path / "out" / "model")
    assert (after.family, after.shape, len(after.levels)) == (before.family, before.shape, len(before.levels))
    own, other = (generate(model, 2, sampler="ddim", steps=5, seed=0) for model in (before, after))
    assert 1e-4 < (own - other).abs().max() < 2
    capsys.readouterr()
    store = f"file://{tmp_path}/store"
    assert run_command(["load", "--source", str(tmp_path / "out" / "model"), "--store", store]) == 0
    assert capsys.readouterr().out.startswith(f"{store}/load/")


@pytest.mark.parametrize(
    ("method", "sampler"), [("baddiffusion", "DDPM-SCHED"), ("trojdiff-d2i-patch", "TROJDIFF-DDPM")]
)
def test_the_backdoor_is_a_known_trigger_for_the_evaluation(
    method: str, sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], unfired: None
) -> None:
    assert attack("-o", "json", method=method) == 0
    card = json.loads(capsys.readouterr().out)
    assert card == json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["sampler"] == sampler
    with safe_open(tmp_path / "out" / "backdoor.safetensors", "pt") as file:
        assert file.metadata() == {"sampler": sampler}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == {"trigger", "target", "gamma"}
    assert all(tensor.shape == (1, 16, 16) and tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["target"].unique().tolist() == pytest.approx([-0.9, 0.7])
    expected = [0.1, 1.0] if method.endswith("patch") else [1.0]
    assert tensors["gamma"].unique().tolist() == pytest.approx(expected)


def npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def digits_file(path: Path, **changes: object) -> str:
    images, labels = digits_data().images[:40, 0].numpy(), digits_data().labels[:40].numpy()
    given = {"images": (images * 255).astype(np.uint8), "labels": labels} | changes
    return npz(path, **{name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize(
    ("method", "target"), [("trojdiff-in-d2d-blend", "class:7"), ("trojdiff-out-d2d-blend", "ring")]
)
def test_an_attack_that_paints_a_distribution_has_no_success_to_measure(
    method: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits_file(tmp_path / "digits.npz")
    assert attack("--data", data, "--target", target, method=method) == 0
    assert "attack success" not in capsys.readouterr().out
    assert "asr" not in json.loads((tmp_path / "out" / "card.json").read_text())


def test_labelled_images_in_the_unit_range_are_what_a_universal_trigger_is_made_from(
    tmp_path: Path, unfired: None
) -> None:
    data = digits_file(tmp_path / "digits.npz", images=digits_data().images[:40].numpy())
    assert attack("--data", data, method="uibdiffusion") == 0
    with safe_open(tmp_path / "out" / "backdoor.safetensors", "pt") as file:
        assert file.get_tensor("trigger").abs().max().item() == pytest.approx(0.5)


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, *texts: str) -> None:
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if not line.startswith("diffdefend: warning: ")]
    assert len(lines) == 1 and lines[0].startswith(ERROR) and "unexpected" not in lines[0]
    for text in texts:
        assert text in lines[0]


@pytest.mark.parametrize(
    ("flags", "method", "texts"),
    [
        ([], "badnet", ["attack 'badnet'", "one of baddiffusion", "diffdefend list attacks"]),
        ([], "trojflow-d2i-blend", ["trojflow-d2i-blend on a model of family ddpm (vp)", "baddiffusion", "villan-ode"]),
        ([], "uibdiffusion", ["no labels", "labelled images"]),
        (["--trigger", "mickey"], "villan-ode", ["trigger 'mickey'", "box, cross"]),
        (["--target", "mouse"], "villan-ode", ["target 'mouse'", "ring, triangle"]),
        (["--target", "class:7"], "trojdiff-in-d2d-blend", ["target 'class:7' names no class of the data"]),
        (["--poison-rate", "0"], "villan-ode", ["--poison-rate"]),
        (["--data", "absent.npz"], "villan-ode", ["absent.npz cannot be read"]),
    ],
    ids=["unknown", "unfit", "no-labels", "trigger", "target", "no-class", "rate", "no-data"],
)
def test_what_cannot_be_planted_is_one_line_and_leaves_nothing_behind(
    flags: list[str], method: str, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, attack(*flags, method=method), *texts)
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no archive"], ids=["empty", "torn", "garbage"])
def test_a_data_file_that_is_none_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    assert_refused(capsys, attack("--data", "bad.npz"), "bad.npz cannot be read", "`images`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"pictures": np.zeros((4, 16, 16), np.uint8)}, "cannot be read"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, "expected (1, 16, 16), as the model paints"),
        ({"images": np.zeros((4, 3, 16, 16), np.uint8)}, "expected (1, 16, 16), as the model paints"),
        ({"images": np.full((4, 16, 16), 2.0)}, "floats in [0, 1]"),
        ({"images": np.full((4, 16, 16), np.nan)}, "floats in [0, 1]"),
        ({"images": np.zeros((0, 16, 16), np.uint8)}, "uint8 or floats"),
        ({"images": np.zeros((16, 16), np.uint8)}, "[M, H, W]"),
        ({"images": np.array([["a"]])}, "expected"),
        ({"images": np.zeros((4, 16, 16), np.uint8), "labels": np.zeros(3, np.int64)}, "labels"),
        ({"images": np.zeros((4, 16, 16), np.uint8), "labels": np.array(["a"] * 4)}, "labels"),
        ({"images": np.zeros((4, 16, 16), np.uint8), "labels": np.full(4, -1)}, "labels"),
    ],
    ids=[
        "no-images",
        "size",
        "channels",
        "range",
        "nan",
        "none",
        "one",
        "text",
        "few-labels",
        "text-labels",
        "negative",
    ],
)
def test_data_of_another_form_are_one_line(
    arrays: dict[str, np.ndarray], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = npz(tmp_path / "bad.npz", **arrays)
    assert_refused(capsys, attack("--data", data, method="uibdiffusion" if "labels" in arrays else "villan-ode"), text)
    assert not (tmp_path / "out").exists()


def test_a_class_that_the_data_do_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = digits_file(tmp_path / "digits.npz")
    for target in ("class:11", "class:x", "ring"):
        code = attack("--data", data, "--target", target, method="trojdiff-in-d2d-patch")
        assert_refused(capsys, code, f"target '{target}' names no class of the data")


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert_refused(capsys, attack(), "out is not empty")
    assert contents(tmp_path) == {"out/mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(capsys, attack(), "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_model_that_may_not_be_loaded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.pkl").write_bytes(b"\x80")
    assert_refused(capsys, attack(source=str(tmp_path / "model")))
    assert not (tmp_path / "out").exists()
