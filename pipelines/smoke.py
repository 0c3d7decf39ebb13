"""Check on a real cluster what only a cluster can show, one line for each promise, and clean up.

    python -m pipelines.smoke --host URL [--model MODEL_URI] [--gpu]

Needs kubectl with a context that may create pods in the namespaces of `--runs` and `--controller`. Exits 0 if every
check passed, 1 if one failed, 2 if they could not be run. What could not be tried is "skip", never "ok".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from components.image import image
from diffdefend_core.config import load_settings
from diffdefend_core.errors import DiffDefendError, InputError
from pipelines.cluster import Cluster
from pipelines.placement import USER, Placement


class CheckFailedError(DiffDefendError, RuntimeError):
    """Raised when a promise does not hold on this cluster."""


class SkippedError(DiffDefendError, RuntimeError):
    """Raised when a promise could not be tried."""


@dataclass(frozen=True, kw_only=True)
class Smoke:
    """What is checked: the server, the namespaces of runs and controller, and a model to gate."""

    cluster: Cluster
    runs: str
    controller: str
    model: str
    gpu: bool
    minutes: int
    placement: Placement

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return every check by the promise that it tries."""
        return {
            "kubectl reaches the cluster": self.reachable,
            "the KFP server answers": self.server,
            "the image runs as a user, root file system read-only": self.restricted,
            "the restricted standard is enforced": self.enforced,
            "nothing unlisted is reached from the controller's namespace": self.denied,
            "the runner account may not exec into pods or read other secrets": self.least,
            "a scratch volume can be written": self.scratch,
            "an accelerator is there": self.accelerator,
            "a schedule is created, shown and removed": self.schedule,
            "a run of the gate ends well": self.run,
        }

    def reachable(self) -> str:
        """The API server answers and both namespaces are there."""
        for namespace in {self.runs, self.controller}:
            kubectl("get", "namespace", namespace, "-o", "name")
        return f"{self.runs}, {self.controller}"

    def server(self) -> str:
        """The server answers, lets us in and lists."""
        return f"{len(self.cluster.schedules())} schedules"

    def restricted(self) -> str:
        """A pod of the cpu image starts under the same restrictions as the controller's, and cannot write its root."""
        script = "touch /tmp/x && ! touch /x 2>/dev/null && diffdefend --version && id -u"
        out = self._pod(self.controller, ["sh", "-c", script])
        if out.split()[-1:] != [str(USER)]:
            raise CheckFailedError(f"the pod said {out!r}", expected=f"user {USER}", action="check the image")
        return out.split("\n")[0]

    def enforced(self) -> str:
        """The API server refuses a privileged pod in the controller's namespace."""
        spec = _pod_spec("x", image("cpu"), ["true"])
        spec["spec"]["containers"][0]["securityContext"] = {"privileged": True}
        out = kubectl("create", "--dry-run=server", "-n", self.controller, "-f", "-", given=spec, fails=True)
        if "violates PodSecurity" not in out:
            raise CheckFailedError(
                f"a privileged pod was not refused in {self.controller}", expected="PodSecurity restricted",
                action="apply manifests/base/namespace.yaml",
            )  # fmt: skip
        return "a privileged pod is refused"

    def denied(self) -> str:
        """A pod without a rule of its own cannot reach the API server: NetworkPolicies work on this cluster."""
        code = "import socket,os; socket.create_connection((os.environ['KUBERNETES_SERVICE_HOST'],443),5)"
        script = f'python3 -c "{code}" 2>/dev/null && echo reached || echo blocked'
        if self._pod(self.controller, ["sh", "-c", script]).split()[-1:] != ["blocked"]:
            raise CheckFailedError(
                "a pod reached what no policy allows", expected="a network plugin that enforces NetworkPolicy",
                action="install one (Calico, Cilium); kind's own does since 0.24",
            )  # fmt: skip
        return "blocked"

    def least(self) -> str:
        """The account of the runs may do what it must, and not more."""
        account = self.cluster.service_account
        if not account:
            raise SkippedError("no --service-account", expected="one", action="give it")
        who = f"--as=system:serviceaccount:{self.runs}:{account}"
        wanted = {
            ("create", "workflowtaskresults.argoproj.io"): "yes", ("create", "pods/exec"): "no",
            ("list", "secrets"): "no", ("delete", "pods"): "no", ("create", "rolebindings"): "no",
        }  # fmt: skip
        for (verb, resource), answer in wanted.items():
            said = kubectl("auth", "can-i", verb, resource, "-n", self.runs, who, check=False).strip()
            if said.split("\n")[-1] != answer:
                raise CheckFailedError(
                    f"may {account} {verb} {resource}? {said}", expected=answer, action="apply manifests/runs"
                )
        return account

    def scratch(self) -> str:
        """A volume as the stages mount it at /tmp takes files of the images' user."""
        volume: dict[str, Any] = {"emptyDir": {"sizeLimit": "1Gi"}}
        if self.placement.scratch_class:
            claim = {
                "accessModes": ["ReadWriteOnce"], "storageClassName": self.placement.scratch_class,
                "resources": {"requests": {"storage": "1Gi"}},
            }  # fmt: skip
            volume = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
        return self._pod(self.runs, ["sh", "-c", "echo x > /tmp/x && echo written"], volume=volume).strip()

    def accelerator(self) -> str:
        """A pod of the gpu image that asks for an accelerator gets one that torch can use."""
        if not self.gpu:
            raise SkippedError("--gpu was not given", expected="a GPU cluster", action="give it")
        code = "import torch; print(torch.cuda.get_device_name(0))"
        return self._pod(self.runs, ["python3", "-c", code], target="gpu", accelerators=1).strip()

    def schedule(self) -> str:
        """A schedule that does not fire before next year appears, once, and is gone after its removal."""
        name = f"diffdefend-smoke-{uuid.uuid4().hex[:8]}"
        settings = load_settings()
        try:
            self.cluster.create(name, ["models:/smoke/1"], "0 0 0 1 1 *", settings, placement=self.placement)
            self.cluster.update(name, ["models:/smoke/2"], "0 0 0 1 1 *", settings, placement=self.placement)
            found = self.cluster.schedules(name)
        finally:
            left = self.cluster.schedules(name)
            if left:
                self.cluster.remove(name)
        if [item.sources for item in found] != [("models:/smoke/2",)] or self.cluster.schedules(name):
            raise CheckFailedError(f"schedules {found}", expected="one, then none", action="see the KFP server's log")
        return name

    def run(self) -> str:
        """The gate runs to its end for the model that was given."""
        if not self.model:
            raise SkippedError("no --model", expected="s3:// or models:/ URI", action="give a small clean model")
        begun = self.cluster.submit(self.model, load_settings(), placement=self.placement)
        deadline = time.monotonic() + self.minutes * 60
        while (outcome := self.cluster.outcome(begun.run_id)) is None:
            if time.monotonic() > deadline:
                self.cluster.stop(begun.run_id)
                raise CheckFailedError(
                    f"no end after {self.minutes} minutes: {begun.url}", expected="an end", action="see its page"
                )
            time.sleep(10)
        if outcome:
            raise CheckFailedError(f"{outcome}: {begun.url}", expected="SUCCEEDED", action="see its page")
        return begun.url

    def _pod(
        self, namespace: str, command: list[str], *, target: str = "cpu", accelerators: int = 0,
        volume: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """Run a pod to its end and return what it printed; it is deleted in any case."""
        name = f"diffdefend-smoke-{uuid.uuid4().hex[:8]}"
        spec = _pod_spec(name, image(target), command, volume=volume)
        if accelerators:
            spec["spec"]["containers"][0]["resources"]["limits"][self.placement.accelerator] = accelerators
            spec["spec"]["tolerations"] = [{"key": self.placement.accelerator, "operator": "Exists"}]
        with _pod(namespace, name, spec):
            path = "jsonpath={.status.phase}"
            for _ in range(self.minutes * 12):
                phase = kubectl("get", "pod", name, "-n", namespace, "-o", path)
                if phase in ("Succeeded", "Failed"):
                    break
                time.sleep(5)
            logs = kubectl("logs", name, "-n", namespace, check=False)
        if phase != "Succeeded":
            raise CheckFailedError(
                f"a pod in {namespace} ended as {phase}: {logs[-200:]}", expected="Succeeded",
                action="check that the cluster can pull the images of DIFFDEFEND_IMAGE",
            )  # fmt: skip
        return logs


@contextmanager
def _pod(namespace: str, name: str, spec: dict[str, Any]) -> Iterator[None]:
    kubectl("create", "-n", namespace, "-f", "-", given=spec)
    try:
        yield
    finally:
        kubectl("delete", "pod", name, "-n", namespace, "--wait=false", "--ignore-not-found", check=False)


def _pod_spec(name: str, reference: str, command: list[str], *, volume: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a pod that meets the restricted standard, with a writable /tmp and nothing else writable."""
    container = {
        "name": "main", "image": reference, "args": command,
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
    security = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "diffdefend"}},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container],
            "securityContext": {**security, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "tmp", **(volume or {"emptyDir": {}})}],
        },
    }  # fmt: skip


def kubectl(*arguments: str, given: dict[str, Any] | None = None, check: bool = True, fails: bool = False) -> str:
    """Run kubectl and return its stdout; with `fails` its stderr, where a failure is what is wanted.

    Raises CheckFailedError if it fails, InputError if there is none.
    """
    try:
        run = subprocess.run(
            ["kubectl", "--request-timeout=30s", *arguments], input=json.dumps(given) if given else None,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError("there is no kubectl", expected="kubectl on PATH", action="install it") from error
    if check and not fails and run.returncode:
        raise CheckFailedError(
            f"kubectl {arguments[0]}: {' '.join(run.stderr.split())[:300]}", expected="success",
            action="check `kubectl config current-context`",
        )  # fmt: skip
    return run.stderr if fails else run.stdout


def report(checks: dict[str, Callable[[], str]]) -> int:
    """Run every check, print a line for each, and return 0 if none failed, 1 otherwise."""
    failed = 0
    for promise, check in checks.items():
        try:
            word, remark = "ok", check()
        except SkippedError as error:
            word, remark = "skip", str(error)
        except DiffDefendError as error:
            word, remark, failed = "FAIL", str(error), failed + 1
        print(f"{word:5} {promise}: {' '.join(remark.split())}", flush=True)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="address of the KFP server")
    parser.add_argument("--runs", default="kubeflow", help="namespace of the runs")
    parser.add_argument("--controller", default="diffdefend", help="namespace of the controller")
    parser.add_argument("--namespace", default="", help="profile, for a server with many users")
    parser.add_argument("--service-account", default="diffdefend-runner", help="account of the pods of a run")
    parser.add_argument("--model", default="", help="small model to gate, s3:// or models:/")
    parser.add_argument("--gpu", action="store_true", help="check accelerators too")
    parser.add_argument("--scratch-class", default="", help="storage class of scratch volumes")
    parser.add_argument("--minutes", type=int, default=60, help="how long a pod or a run may take")
    given = parser.parse_args(arguments)
    try:
        cluster = Cluster(
            host=given.host, experiment="diffdefend-smoke", namespace=given.namespace,
            service_account=given.service_account,
        )  # fmt: skip
        placement = Placement(gpu=given.gpu, scratch="5Gi", scratch_class=given.scratch_class, retries=0)
        return report(Smoke(
            cluster=cluster, runs=given.runs, controller=given.controller, model=given.model, gpu=given.gpu,
            minutes=given.minutes, placement=placement,
        ).checks())  # fmt: skip
    except DiffDefendError as error:
        print(f"diffdefend: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
