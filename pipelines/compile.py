"""Compile the gate for a cluster."""

from pathlib import Path

from kfp import compiler

from diffdefend_core.errors import InputError
from pipelines.gate import gate_pipeline
from pipelines.placement import Placement


def compile_gate(path: Path, *, science: str, gpu: bool = False) -> None:
    """Write the gate as KFP YAML to `path`; with `gpu` its heavy tasks ask for an accelerator.

    `science` is `Settings.science_json()`: what a run of the pipeline uses unless it is given other settings.

    Raises InputError if the file name is not one of YAML or the file cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"output file {path}", expected="a name that ends in .yaml", action="rename it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(gate_pipeline(Placement(gpu=gpu), science), str(path))
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", expected="a writable place", action="pick another"
        ) from error
