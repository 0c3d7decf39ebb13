"""What the placement flags put into the compiled pipelines; the pipeline for a list; the Kubernetes objects."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes_config
from kfp.pipeline_spec import pipeline_spec_pb2

from diffdefend_core.cli import run_command
from diffdefend_core.errors import InputError
from pipelines.compile import Manifest, compile_pipeline
from pipelines.placement import Placement, Toleration, parse_selector

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "manifests" / "components" / "k8s-native-pipeline" / "pipeline.yaml"
HEAVY = {"exec-invert-trigger", "exec-detect", "exec-purify", "exec-evaluate"}

Compile = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    def compiled(kind: str = "gate", **placement: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        path = tmp_path / f"{kind}.yaml"
        compile_pipeline(kind, path, science='{"seed":0}', placement=Placement(**placement))
        spec, platform = yaml.safe_load_all(path.read_text())
        return spec, platform["platforms"]["kubernetes"]

    return compiled


def _executors(platform: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return platform["deploymentSpec"]["executors"]


def test_tolerations_and_selectors_go_to_the_stages_that_compute(compiled: Compile) -> None:
    tolerations = (Toleration.parse("team=ml:NoExecute"), Toleration.parse("spot"))
    _, platform = compiled(gpu=True, tolerations=tolerations, node_selectors=(parse_selector("pool=a100"),))
    for name, executor in _executors(platform).items():
        if name in HEAVY:
            assert executor["nodeSelector"]["labels"] == {"pool": "a100"}
            assert executor["tolerations"] == [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "team", "operator": "Equal", "value": "ml", "effect": "NoExecute"},
                {"key": "spot", "operator": "Exists"},
            ]
        else:
            assert not {"tolerations", "nodeSelector"} & executor.keys(), name
        json_format.ParseDict(executor, kubernetes_config.KubernetesExecutorConfig())


def test_scratch_is_at_tmp_of_the_stages_that_move_weights(compiled: Compile) -> None:
    def mounted(platform: dict[str, Any], kind: str) -> dict[str, str]:
        return {name: item.get("sizeLimit") or item["size"] for name, executor in _executors(platform).items()
                for item in executor.get(kind, []) if item["mountPath"] == "/tmp"}  # fmt: skip

    wanted = dict.fromkeys(HEAVY | {"exec-load"}, "50Gi")
    assert mounted(compiled(scratch="50Gi")[1], "emptyDirMounts") == wanted
    of_class = compiled(scratch="50Gi", scratch_class="fast")[1]
    assert mounted(of_class, "genericEphemeralVolume") == wanted and mounted(of_class, "emptyDirMounts") == {}


def test_what_holds_for_every_task(compiled: Compile) -> None:
    spec, platform = compiled(pull_secret="login", retries=4, minutes=20, keep_hours=2)
    assert platform["pipelineConfig"] == {"resourceTtlOnCompletion": 7200}
    for name, executor in _executors(platform).items():
        assert executor["imagePullSecret"][0]["secretName"] == "login", name
        assert executor["activeDeadlineSeconds"] == "1200", name
        context = executor["securityContext"]
        assert context == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}, name
    assert spec["components"]["comp-treat"]["dag"]


def test_the_list_is_a_loop_over_the_whole_gate(compiled: Compile) -> None:
    spec, platform = compiled("scan", gpu=True)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    (loop,) = spec["root"]["dag"]["tasks"].values()
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--sources"}
    assert loop["iteratorPolicy"]["parallelismLimit"] == 2
    body = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"]
    assert (
        list(body) == ["diffdefend-gate"] and body["diffdefend-gate"]["componentRef"]["name"] == "comp-diffdefend-gate"
    )
    assert set(_executors(platform)) == set(spec["deploymentSpec"]["executors"]) >= HEAVY
    for executor in spec["deploymentSpec"]["executors"].values():
        assert executor["container"]["resources"]["resourceMemoryLimit"]


def test_the_shipped_objects_are_what_is_compiled(tmp_path: Path) -> None:
    """After an intended change: DIFFDEFEND_WRITE_GOLDEN=1 python -m pytest tests/pipelines/test_placement.py"""
    path = SHIPPED if os.environ.get("DIFFDEFEND_WRITE_GOLDEN") else tmp_path / "pipeline.yaml"
    compile_pipeline(
        "gate", path, science="", placement=Placement(gpu=True, scratch="20Gi"),
        manifest=Manifest(version="v0-1-0", namespace="kubeflow"),
    )  # fmt: skip
    assert path.read_text() == SHIPPED.read_text()
    pipeline, version = yaml.safe_load_all(SHIPPED.read_text())
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", version["metadata"]["name"])
    json_format.ParseDict(version["spec"]["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    for executor in _executors(version["spec"]["platformSpec"]["platforms"]["kubernetes"]).values():
        json_format.ParseDict(executor, kubernetes_config.KubernetesExecutorConfig())


@pytest.mark.parametrize("text", ["", "a b", "=x", "a=b:Never", "a:b", "a=b=c", "a\n", "-a"])
def test_a_wrong_toleration_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="toleration"):
        Toleration.parse(text)


@pytest.mark.parametrize("text", ["", "pool", "=x", "a b=c", "a=b c"])
def test_a_wrong_selector_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="node selector"):
        parse_selector(text)


@pytest.mark.parametrize("name", ["V1", "v_1", "", "-a", "a" * 254])
def test_a_name_that_kubernetes_refuses_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["compile", "-o", str(tmp_path / "x.yaml"), "--manifest", name]) == 2
    assert "object name" in capfd.readouterr().err and not (tmp_path / "x.yaml").exists()


def test_images_by_tag_are_refused_where_digests_are_required(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text("old")
    assert run_command(["compile", "-o", str(tmp_path / "x.yaml"), "--require-digests"]) == 2
    assert "without a digest" in capfd.readouterr().err and (tmp_path / "x.yaml").read_text() == "old"
