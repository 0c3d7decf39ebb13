"""The compiled gate: what a cluster would be given.

After an intended change of the pipeline, write the golden file anew and read its diff:
    DIFFDEFEND_WRITE_GOLDEN=1 python -m pytest tests/pipelines/test_compiled_gate.py
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes_config
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import image
from diffdefend_core.artifacts import Word
from diffdefend_core.errors import InputError
from pipelines.compile import compile_gate

GOLDEN = Path(__file__).parent / "golden" / "gate.yaml"
HEAVY = {"invert-trigger", "detect", "purify", "evaluate"}
STAGES = HEAVY | {"load", "keep", "quarantine", "register"}
HOSTILE = ("", "Clean", " clean", "clean ", "clean\n", "clean,backdoored", "error", "None", "null", "true", "0",
           "x' == 'x' or 'a", "clean' || true || 'a", "\u0441lean", "backdoored\x00")  # fmt: skip

Documents = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return _compile(tmp_path_factory.mktemp("compiled") / "gate.yaml", gpu=False)


@pytest.fixture(scope="module")
def compiled_for_gpus(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return _compile(tmp_path_factory.mktemp("compiled") / "gate.yaml", gpu=True)


def _compile(path: Path, *, gpu: bool) -> Documents:
    compile_gate(path, science='{"seed":0}', gpu=gpu)
    spec, platform = yaml.safe_load_all(path.read_text())
    return spec, platform


def _containers(documents: Documents) -> dict[str, dict[str, Any]]:
    executors = documents[0]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def _placements(documents: Documents) -> dict[str, dict[str, Any]]:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor for name, executor in executors.items()}


def _tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).items()


def test_the_golden_file_is_what_is_compiled(compiled_for_gpus: Documents, tmp_path: Path) -> None:
    spec, platform = compiled_for_gpus
    text = yaml.safe_dump_all([{**spec, "sdkVersion": "SDK"}, platform], sort_keys=True)
    for target in ("cpu", "gpu"):
        text = text.replace(image(target), f"IMAGE-{target}")
    if os.environ.get("DIFFDEFEND_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_both_documents_parse_strictly(compiled_for_gpus: Documents) -> None:
    spec, platform = compiled_for_gpus
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes_config.KubernetesExecutorConfig())
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict({**spec, "noSuchField": 1}, pipeline_spec_pb2.PipelineSpec())


def test_compiling_twice_gives_the_same(compiled: Documents, tmp_path: Path) -> None:
    assert _compile(tmp_path / "again.yaml", gpu=False) == compiled


def _reached(spec: dict[str, Any], word: str) -> set[str]:
    """Return the stages that the branch would run for `word`, by the conditions as a cluster evaluates them."""
    reached = set()
    for _, task in _tasks(spec):
        condition = task.get("triggerPolicy", {}).get("condition")
        if condition and _holds(condition, word):
            reached |= set(spec["components"][task["componentRef"]["name"]]["dag"]["tasks"])
    return reached


def _holds(condition: str, word: str) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(condition))
    inputs = {"parameter_values": {"pipelinechannel--word": word}}
    return bool(program.evaluate({"inputs": celpy.json_to_cel(inputs)}))


def test_only_clean_is_kept_only_backdoored_repaired(compiled: Documents) -> None:
    spec = compiled[0]
    branch = {"clean": "keep", "backdoored": "purify", "inconclusive": "quarantine"}
    assert set(branch) == {word.value for word in Word}
    for word, stage in branch.items():
        assert _reached(spec, word) == {stage}


@pytest.mark.parametrize("word", HOSTILE)
def test_any_other_word_is_set_aside(compiled: Documents, word: str) -> None:
    assert _reached(compiled[0], word) == {"quarantine"}


def test_no_condition_stands_alone(compiled: Documents) -> None:
    """A lone condition on a named output is skipped by kfp.local: there must be an Else to each."""
    spec = compiled[0]
    for component in [spec["root"], *spec["components"].values()]:
        tasks = component.get("dag", {}).get("tasks", {}).values()
        conditions = [task["triggerPolicy"]["condition"] for task in tasks if "triggerPolicy" in task]
        assert len(conditions) in (0, 3)


def test_load_and_register_are_never_cached(compiled: Documents) -> None:
    cached = {name: bool(task["cachingOptions"].get("enableCache")) for name, task in _tasks(compiled[0])
              if name in STAGES}  # fmt: skip
    assert cached == {name: name not in ("load", "register") for name in STAGES}


def test_what_decides_a_result_is_in_the_cache_key(compiled: Documents) -> None:
    for stage in STAGES:
        inputs = compiled[0]["components"][f"comp-{stage}"]["inputDefinitions"]["parameters"]
        assert "settings" in inputs, stage


def test_every_stage_has_limits_retries_and_a_time_out(compiled_for_gpus: Documents) -> None:
    containers, placements = _containers(compiled_for_gpus), _placements(compiled_for_gpus)
    assert set(containers) == set(placements) == STAGES
    for stage, container in containers.items():
        assert container["resources"]["resourceCpuLimit"] and container["resources"]["resourceMemoryLimit"], stage
        assert int(placements[stage]["activeDeadlineSeconds"]) > 0, stage
        assert placements[stage]["securityContext"]["runAsNonRoot"], stage
    for name, task in _tasks(compiled_for_gpus[0]):
        assert name not in STAGES or task["retryPolicy"]["maxRetryCount"] == 2


def test_accelerators_go_to_the_stages_that_compute(compiled: Documents, compiled_for_gpus: Documents) -> None:
    def accelerated(documents: Documents) -> set[str]:
        return {name for name, item in _containers(documents).items() if "accelerator" in item["resources"]}

    assert accelerated(compiled_for_gpus) == HEAVY
    assert accelerated(compiled) == set()
    tolerant = {name for name, item in _placements(compiled_for_gpus).items() if "tolerations" in item}
    assert tolerant == HEAVY


def test_the_stages_that_compute_have_shared_memory(compiled: Documents) -> None:
    mounts = {name: item.get("emptyDirMounts", []) for name, item in _placements(compiled).items()}
    assert {name for name, items in mounts.items() if [item["mountPath"] for item in items] == ["/dev/shm"]} == HEAVY


def test_credentials_come_by_reference(compiled: Documents) -> None:
    for stage, placement in _placements(compiled).items():
        secrets = {item["secretName"] for item in placement["secretAsEnv"]}
        registry = {"load": {"diffdefend-mlflow-read"}, "register": {"diffdefend-mlflow", "diffdefend-signing"}}
        wanted = {"diffdefend-s3"} | registry.get(stage, set())
        assert secrets == wanted, stage
        assert all(item["optional"] for item in placement["secretAsEnv"])
    assert not any("env" in container for container in _containers(compiled).values())


@pytest.mark.parametrize("name", ["gate", "gate.txt", "gate.json"])
def test_only_yaml_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="yaml"):
        compile_gate(tmp_path / name, science="{}")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        compile_gate(tmp_path / "file" / "gate.yaml", science="{}")
