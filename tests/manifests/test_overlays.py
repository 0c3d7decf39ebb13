"""What `kubectl apply -k` would be given: every overlay built by kustomize and checked against the API's schemas."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from diffdefend_core.cli.registry import scan_registry, serve_webhook
from diffdefend_core.config import Settings, load_settings, merge_flags, parse_assignment
from diffdefend_core.options import SigningOptions
from diffdefend_core.report.registry_document import ScanSummary
from diffdefend_core.stages import attestation
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.scan_metrics import Sink, measured
from diffdefend_core.webhook.metrics import Metrics

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = ("dev", "prod", "multi-user")
VERSIONS = ("1.29", "1.33")
NOT_KUBERNETES = ("Pipeline", "PipelineVersion", "ServiceMonitor", "PrometheusRule")

Objects = dict[str, list[dict[str, Any]]]


def kustomize() -> list[str] | None:
    """Return the command of a kustomize of version 5 or newer: of its own, or inside kubectl."""
    for command, version in ((["kustomize", "build"], ["kustomize", "version"]),
                             (["kubectl", "kustomize"], ["kubectl", "version", "--client"])):  # fmt: skip
        if shutil.which(command[0]):
            said = subprocess.run(version, capture_output=True, text=True, check=False).stdout
            match = re.search(r"(?:Kustomize Version: |^)v(\d+)\.", said, re.MULTILINE)
            if match and int(match[1]) >= 5:
                return command
    return None


@pytest.fixture(scope="session")
def built() -> Objects:
    command = kustomize()
    if command is None:
        pytest.skip("no kustomize of version 5 or newer, alone or in kubectl (1.29 or newer): overlays are not built")
    return {overlay: _build(command, MANIFESTS / "overlays" / overlay) for overlay in OVERLAYS}


def _build(command: list[str], folder: Path) -> list[dict[str, Any]]:
    run = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return [item for item in yaml.safe_load_all(run.stdout) if item]


def _workloads(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, pod spec) of everything that makes pods."""
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if item["kind"] in ("CronJob", "Job", "Deployment", "StatefulSet", "DaemonSet"):
            yield item["metadata"]["name"], spec["template"]["spec"]


def _find(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"].startswith(name)]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_schema_of_kubernetes(built: Objects, overlay: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra [dev])")
    checked = [item for item in built[overlay] if item["kind"] not in NOT_KUBERNETES]
    assert len(checked) > 8
    for item in checked:
        validate.validate(item, version, strict=True)


def test_a_misspelt_field_would_be_found(built: Objects) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra [dev])")
    job = json.loads(json.dumps(_find(built["dev"], "CronJob", "diffdefend-scan-registry")))
    job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["resourcess"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(job, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_meets_the_restricted_standard(built: Objects, overlay: str) -> None:
    names = set()
    for name, pod in _workloads(built[overlay]):
        names.add(name)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] != "default", name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys(), name
    assert "diffdefend-scan-registry" in names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_credential_is_in_a_manifest(built: Objects, overlay: str) -> None:
    assert not [item for item in built[overlay] if item["kind"] == "Secret"]
    for name, pod in _workloads(built[overlay]):
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if re.search(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|SIGNING", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], (name, variable["name"])
    for item in built[overlay]:
        if item["kind"] == "ConfigMap":
            assert not re.search(r"(?i)password|secret|token|private key", "\n".join(item["data"])), item["metadata"]


def test_no_file_of_the_repository_holds_a_credential() -> None:
    values = r"(?i:password|secretkey|accesskey): *[\"']?(?!accesskey|secretkey|password|username)[A-Za-z0-9]{8,}"
    pattern = re.compile(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|" + values)
    assert pattern.search("secretkey: hunter2hunter2") and pattern.search("POSTGRES_PASSWORD: 'abcdefgh1'")
    files = [path for folder in ("manifests", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path.name for path in files if pattern.search(path.read_text())] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_may_do_only_what_is_listed(built: Objects, overlay: str) -> None:
    assert not [item for item in built[overlay] if item["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for role in (item for item in built[overlay] if item["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert not {"pods/exec", "roles", "rolebindings"} & set(rule["resources"])
            assert "secrets" not in rule["resources"] or rule["resourceNames"]
    for binding in (item for item in built[overlay] if item["kind"] == "RoleBinding"):
        assert _find(built[overlay], "Role", binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            account = _find(built[overlay], "ServiceAccount", subject["name"])
            assert subject["namespace"] == account["metadata"]["namespace"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_nightly_scan_never_overlaps_and_ends(built: Objects, overlay: str) -> None:
    spec = _find(built[overlay], "CronJob", "diffdefend-scan-registry")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] >= 60
    assert spec["successfulJobsHistoryLimit"] > 0 and spec["failedJobsHistoryLimit"] > 0
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_nothing_is_reached_unless_it_is_allowed(built: Objects, overlay: str) -> None:
    policies = [item for item in built[overlay] if item["kind"] == "NetworkPolicy"]
    (deny,) = [item for item in policies if item["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    namespace = _find(built[overlay], "Namespace", "diffdefend")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {name for name, _ in _workloads(built[overlay])} >= {"mlflow", "postgresql", "diffdefend-webhook"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_lead_to_objects_of_the_overlay(built: Objects, overlay: str) -> None:
    """A ConfigMap that is not there would hold up the pod; Secrets are the user's, and documented."""
    maps = {item["metadata"]["name"] for item in built[overlay] if item["kind"] == "ConfigMap"}
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for _, pod in _workloads(built[overlay]):
        text = json.dumps(pod)
        named = re.findall(r'"configMap(?:Ref)?": {"name": "([^"]+)"', text)
        assert set(named) <= maps
        for secret in re.findall(r'"secretKeyRef": {[^}]*"name": "([^"]+)"', text):
            assert f"`{secret}`" in page, secret


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_pinned(built: Objects, overlay: str) -> None:
    for name, pod in _workloads(built[overlay]):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert re.search(r"@sha256:[0-9a-f]{64}$|:[\w.-]*\d[\w.-]*$", container["image"]), name
            if overlay == "prod" and "diffdefend" in container["image"]:
                assert "@sha256:" in container["image"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_of_the_controller_is_read_by_its_commands(built: Objects, overlay: str) -> None:
    """A misspelt variable, or one that the command does not know, would be ignored in silence."""
    given = _find(built[overlay], "ConfigMap", "diffdefend-controller")["data"]
    settings = {f"DIFFDEFEND_{name.upper()}" for name in Settings.model_fields}
    elsewhere = {"AWS_REGION", "DIFFDEFEND_S3_ENDPOINT", "DIFFDEFEND_IMAGE_CPU", "DIFFDEFEND_IMAGE_GPU"}
    for command in (scan_registry, serve_webhook):
        flags = {str(parameter.envvar) for parameter in command.params}
        strange = {name for name in given if name.partition("__")[0] not in settings | flags | elsewhere}
        assert strange == set(), command.name
    groups = {name: value for name, value in given.items() if "__" in name}
    load_settings(**merge_flags(*(parse_assignment(f"{_path(name)}={value}") for name, value in groups.items())))


def _path(variable: str) -> str:
    return variable.removeprefix("DIFFDEFEND_").lower().replace("__", ".")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_controllers_verify_by_public_keys_and_cannot_sign(built: Objects, overlay: str) -> None:
    given = _find(built[overlay], "ConfigMap", "diffdefend-controller")["data"]
    keys = _find(built[overlay], "ConfigMap", "diffdefend-keys")["metadata"]["name"]
    controllers = 0
    for name, pod in _workloads(built[overlay]):
        assert "diffdefend-signing" not in json.dumps(pod) and "SIGNING_KEY" not in json.dumps(pod), name
        if pod["serviceAccountName"] != "diffdefend-controller":
            continue
        controllers += 1
        (volume,) = [item for item in pod["volumes"] if item.get("configMap", {}).get("name") == keys]
        (mount,) = [item for item in pod["containers"][0]["volumeMounts"] if item["name"] == volume["name"]]
        assert mount["readOnly"] and mount["mountPath"] == given["DIFFDEFEND_SIGNING__TRUSTED_KEYS"]
        assert given["DIFFDEFEND_SIGNING__REVOKED_KEYS"] == f"{mount['mountPath']}/revoked.txt"
    assert controllers == 2


@pytest.mark.parametrize("overlay", ["prod", "multi-user"])
def test_the_nightly_scan_pushes_to_a_gateway_that_is_there_and_may_be_reached(built: Objects, overlay: str) -> None:
    objects = built[overlay]
    job = _find(objects, "CronJob", "diffdefend-scan-registry")
    (pod,) = [pod for name, pod in _workloads(objects) if name == "diffdefend-scan-registry"]
    given = {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}
    Sink(given["DIFFDEFEND_METRICS"])
    match = re.fullmatch(r"http://([\w-]+):(\d+)", given["DIFFDEFEND_METRICS"])
    assert match is not None, "a name of the same namespace, which an overlay may change"
    service, gateway = _find(objects, "Service", match[1]), _find(objects, "Deployment", match[1])
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"] == gateway["metadata"]["namespace"]
    assert service["spec"]["ports"][0]["port"] == int(match[2])
    labels = gateway["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    scan = job["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    inward, outward = (_find(objects, "NetworkPolicy", name)["spec"] for name in ("pushgateway", "scan-to-pushgateway"))
    assert inward["podSelector"]["matchLabels"].items() <= labels.items()
    assert inward["ingress"][0]["from"][0]["podSelector"]["matchLabels"].items() <= scan.items()
    assert outward["podSelector"]["matchLabels"].items() <= scan.items()
    assert outward["egress"][0]["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    assert {rule["ports"][0]["port"] for rule in inward["ingress"] + outward["egress"]} == {int(match[2])}
    (monitor,) = [item for item in objects if item["kind"] == "ServiceMonitor" and match[1] in item["metadata"]["name"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


@pytest.mark.parametrize("overlay", ["prod", "multi-user"])
def test_every_alert_is_about_a_metric_that_exists(built: Objects, overlay: str) -> None:
    """A misspelt metric would never raise an alarm."""
    summary = ScanSummary(
        code_version="", scan="", registry="", runner="", policy_digest="", config_digest="", only=(), since="",
        dry_run=False, resumed=False, started="", seconds=0.0, listed=0, versions=(),
    )  # fmt: skip
    metrics = Metrics()
    metrics.watch(lambda: 0)
    shown = metrics.text().decode() + generate_latest(measured(summary, 0.0, 0.0)).decode()
    known = {line.split("{")[0].split()[0] for line in shown.splitlines() if not line.startswith("#")}
    rules = _find(built[overlay], "PrometheusRule", "diffdefend")["spec"]["groups"][0]["rules"]
    named = {name for rule in rules for name in re.findall(r"diffdefend_\w+", rule["expr"])}
    assert len(named) >= 4 and named <= known
    assert {"UnscannedChampion", "NightlyScanMissing"} <= {rule["alert"] for rule in rules}


def test_in_a_profile_no_proxy_outlives_the_scan_and_kfp_knows_both_controllers(built: Objects) -> None:
    for item in built["multi-user"]:
        spec = item.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if item["kind"] not in ("CronJob", "Deployment") or template is None:
            continue
        assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false", item["metadata"]["name"]
        pod = template["spec"]
        if pod["serviceAccountName"] != "diffdefend-controller":
            continue
        (volume,) = [volume for volume in pod["volumes"] if "projected" in volume]
        token = volume["projected"]["sources"][0]["serviceAccountToken"]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
        assert f"{mount['mountPath']}/{token['path']}" == "/var/run/secrets/kubeflow/pipelines/token"
        assert token["audience"] == "pipelines.kubeflow.org"


def test_in_a_profile_only_pods_of_ours_are_limited_and_mlflow_reaches_the_webhook(built: Objects) -> None:
    policies = [item for item in built["multi-user"] if item["kind"] == "NetworkPolicy"]
    assert all("diffdefend" in json.dumps(item["spec"]["podSelector"]) or
               item["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/component": "controller"}}
               for item in policies)  # fmt: skip
    (webhook,) = [item for item in policies if item["metadata"]["name"] == "webhook"]
    (where,) = webhook["spec"]["ingress"][0]["from"]
    assert where == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "mlflow"}}}


def test_an_overlay_brings_its_public_keys(built: Objects, tmp_path: Path) -> None:
    """As docs/kubernetes.md says; what the pods then find is what the controller trusts."""
    key = write_key(tmp_path / "made")
    place = tmp_path / "mine"
    place.mkdir()
    public = Path(key["public_file"])
    (place / public.name).write_bytes(public.read_bytes())
    (place / "revoked.txt").write_text(f"{key['key_id']}  # a reason\n")
    (place / "kustomization.yaml").write_text(f"""
resources: [{os.path.relpath(MANIFESTS / "overlays" / "dev", place)}]
configMapGenerator:
- name: diffdefend-keys
  namespace: diffdefend
  behavior: merge
  files: [{public.name}, revoked.txt]
""")
    command = kustomize()
    assert command is not None
    objects = _build(command, place)
    made = _find(objects, "ConfigMap", "diffdefend-keys")
    assert made["metadata"]["name"] != _find(built["dev"], "ConfigMap", "diffdefend-keys")["metadata"]["name"]
    assert made["metadata"]["name"] in json.dumps(_find(objects, "CronJob", "diffdefend-scan-registry"))
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for name, text in made["data"].items():
        (mounted / name).write_text(text)
    signing = SigningOptions(trusted_keys=str(mounted), revoked_keys=str(mounted / "revoked.txt"))
    settings = load_settings().model_copy(update={"signing": signing})
    assert list(attestation.trusted_keys(settings)) == [key["key_id"]]
    assert attestation.revoked_keys(settings) == {key["key_id"]}


def test_the_revocations_that_are_shipped_revoke_nothing() -> None:
    signing = SigningOptions(revoked_keys=str(MANIFESTS / "base" / "revoked.txt"))
    assert attestation.revoked_keys(load_settings().model_copy(update={"signing": signing})) == frozenset()


def test_the_policy_is_the_shipped_one() -> None:
    shipped = ROOT / "diffdefend_core" / "gate" / "policies" / "shipped.yaml"
    assert (MANIFESTS / "base" / "policy.yaml").read_text() == shipped.read_text()


def test_the_budget_never_holds_up_a_drain(built: Objects) -> None:
    objects = built["prod"]
    for budget in (item for item in objects if item["kind"] == "PodDisruptionBudget"):
        replicas = _find(objects, "Deployment", budget["metadata"]["name"])["spec"]["replicas"]
        assert budget["spec"]["minAvailable"] < replicas
