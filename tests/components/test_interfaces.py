"""Every component: its command exists in the command line, its options too, and its image is the right one."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from kfp import dsl

from components.detect.component import detect
from components.evaluate.component import evaluate
from components.image import COMMAND, image
from components.invert_trigger.component import invert_trigger
from components.keep.component import keep
from components.load.component import load
from components.purify.component import purify
from components.quarantine.component import quarantine
from components.register.component import register
from diffdefend_core import __version__
from diffdefend_core.cli import cli

ROOT = Path(__file__).parents[2]
TARGETS = {
    load: "cpu",
    invert_trigger: "gpu",
    detect: "gpu",
    keep: "cpu",
    purify: "gpu",
    quarantine: "cpu",
    evaluate: "gpu",
    register: "cpu",
}
COMPONENTS = pytest.mark.parametrize("component", TARGETS, ids=lambda component: component.name)


@COMPONENTS
def test_the_command_line_of_a_component_parses(component: dsl.base_component.BaseComponent) -> None:
    container = component.component_spec.implementation.container
    assert list(container.command) == COMMAND
    name, *arguments = [str(argument) for argument in container.args]
    assert name == component.name
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = command.make_context(name, arguments)
    assert context.params["uri_output"] is not None
    with pytest.raises(click.UsageError):
        command.make_context(name, [*arguments, "--no-such-option"])


@COMPONENTS
def test_an_input_is_documented_and_used(component: dsl.base_component.BaseComponent) -> None:
    arguments = " ".join(str(argument) for argument in component.component_spec.implementation.container.args)
    for name, parameter in component.component_spec.inputs.items():
        assert parameter.description, name
        assert f"inputs.parameters['{name}']" in arguments
    for name in component.component_spec.outputs:
        assert f"['{name}']" in arguments


@COMPONENTS
def test_torch_is_only_in_the_image_of_those_that_compute(component: dsl.base_component.BaseComponent) -> None:
    assert component.component_spec.implementation.container.image == image(TARGETS[component])


def test_the_image_is_set_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFDEFEND_IMAGE", raising=False)
    assert image("cpu") == f"diffdefend:{__version__}-cpu"
    monkeypatch.setenv("DIFFDEFEND_IMAGE", "registry.example/team/diffdefend:2-{target}")
    assert image("gpu") == "registry.example/team/diffdefend:2-gpu"
    monkeypatch.setenv("DIFFDEFEND_IMAGE", "registry.example/team/diffdefend@sha256:00")
    assert image("gpu") == image("cpu") == "registry.example/team/diffdefend@sha256:00"


def test_components_import_no_torch() -> None:
    code = "import sys, pipelines.gate; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert run.stdout == "False\n", run.stderr
