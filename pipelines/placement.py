"""Where a task runs and what it may use: limits, accelerator, retries, time-out, scratch, credentials by reference."""

import re
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes

from diffdefend_core.errors import InputError

CONFIG_MAP = "diffdefend"
S3_SECRET = "diffdefend-s3"
MLFLOW_SECRET = "diffdefend-mlflow"
SIGNING_SECRET = "diffdefend-signing"
MLFLOW_READ_SECRET = "diffdefend-mlflow-read"
USER = 10001
_CONFIGURATION = {
    "store": "DIFFDEFEND_STORE",
    "tracking-uri": "DIFFDEFEND_TRACKING_URI",
    "s3-endpoint": "DIFFDEFEND_S3_ENDPOINT",
    "s3-region": "AWS_REGION",
}
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_QUANTITY = re.compile(r"[1-9]\d*(Mi|Gi|Ti)")
_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint that the stages that compute put up with; without a value every value of the key is tolerated."""

    key: str
    value: str | None = None
    effect: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Toleration":
        """Return the toleration `KEY[=VALUE][:EFFECT]`. Raises InputError."""
        match = re.fullmatch(rf"(?P<key>{_LABEL})(=(?P<value>{_VALUE}))?(:(?P<effect>{'|'.join(_EFFECTS)}))?", text)
        if match is None:
            raise InputError(
                f"toleration {text!r}",
                expected=f"KEY[=VALUE][:EFFECT] with an effect of {', '.join(_EFFECTS)}",
                action="write it as `kubectl taint` does",
            )
        return cls(key=match["key"], value=match["value"], effect=match["effect"])

    def arguments(self) -> dict[str, Any]:
        """Return the fields of a Kubernetes toleration that are set."""
        exists = {"operator": "Exists"} if self.value is None else {"operator": "Equal", "value": self.value}
        return {"key": self.key, **exists, **({"effect": self.effect} if self.effect else {})}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the tasks of a pipeline are placed on a cluster; kfp.local ignores all but `retries`.

    Tolerations and node selectors hold for the stages that compute. `scratch` is the size of the volume at /tmp of the
    stages that move weights; with `scratch_class` it is a generic ephemeral volume of that storage class, else a part
    of the node's disk. `keep_hours` is how long the workflow object stays after the end of a run. Quantities are those
    of Kubernetes ("20Gi"). Raises InputError.
    """

    gpu: bool = False
    accelerator: str = "nvidia.com/gpu"
    tolerations: tuple[Toleration, ...] = ()
    node_selectors: tuple[tuple[str, str], ...] = ()
    memory: str = "16Gi"
    shm: str = "4Gi"
    scratch: str = ""
    scratch_class: str = ""
    pull_secret: str = ""
    retries: int = 2
    minutes: int = 240
    keep_hours: int = 0

    def __post_init__(self) -> None:
        for name in ("memory", "shm", "scratch"):
            value = getattr(self, name)
            if not _QUANTITY.fullmatch(value) and not (name == "scratch" and not value):
                raise InputError(f"{name} {value!r}", expected="a quantity such as 20Gi", action=f"mend --{name}")
        if self.scratch_class and not self.scratch:
            raise InputError(
                f"a storage class {self.scratch_class!r} without a size", expected="both", action="give --scratch too"
            )

    def light(self, task: dsl.PipelineTask, *, registry: str = "", weights: bool = False) -> dsl.PipelineTask:
        """Place a task without torch; `registry`, a secret: it talks to MLflow, uncached; `weights`: it moves them."""
        self._common(task, cpu="1", memory="2Gi", minutes=min(30, self.minutes))
        if weights:
            self._scratch(task)
        if registry:
            task.set_caching_options(enable_caching=False)
            names = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
            kubernetes.use_secret_as_env(task, registry, names, optional=True)
        return task

    def signing(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Give the task the key that signs decisions, if the namespace has one: for `register` alone."""
        kubernetes.use_secret_as_env(task, SIGNING_SECRET, {"key": "DIFFDEFEND_SIGNING_KEY"}, optional=True)
        return task

    def heavy(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Place a task that computes with torch: on an accelerator with `gpu`, with enough shared memory."""
        self._common(task, cpu="4", memory=self.memory, minutes=self.minutes)
        self._scratch(task)
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=self.shm)
        if self.gpu:
            task.set_accelerator_type(self.accelerator).set_accelerator_limit(1)
            kubernetes.add_toleration(task, key=self.accelerator, operator="Exists", effect="NoSchedule")
        for toleration in self.tolerations:
            kubernetes.add_toleration(task, **toleration.arguments())
        for label, value in self.node_selectors:
            kubernetes.add_node_selector(task, label, value)
        return task

    def pipeline_config(self) -> dsl.PipelineConfig | None:
        """Return what holds for a run as a whole, None if nothing was asked for."""
        if not self.keep_hours:
            return None
        return dsl.PipelineConfig(ttl_seconds_after_finished=self.keep_hours * 3600)

    def _common(self, task: dsl.PipelineTask, *, cpu: str, memory: str, minutes: int) -> None:
        task.set_cpu_request("500m").set_cpu_limit(cpu).set_memory_request("1Gi").set_memory_limit(memory)
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        kubernetes.set_timeout(task, minutes * 60)
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, _CONFIGURATION, optional=True)
        keys = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
        kubernetes.use_secret_as_env(task, S3_SECRET, keys, optional=True)
        if self.pull_secret:
            kubernetes.set_image_pull_secrets(task, [self.pull_secret])

    def _scratch(self, task: dsl.PipelineTask) -> None:
        """Mount the scratch volume at /tmp, where every stage puts its temporary files."""
        if self.scratch_class:
            kubernetes.add_ephemeral_volume(
                task, "scratch", "/tmp", ["ReadWriteOnce"], self.scratch, storage_class_name=self.scratch_class
            )
        elif self.scratch:
            kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=self.scratch)


def parse_selector(text: str) -> tuple[str, str]:
    """Return the node selector `LABEL=VALUE` as a pair. Raises InputError."""
    match = re.fullmatch(rf"({_LABEL})=({_VALUE})", text)
    if match is None:
        raise InputError(f"node selector {text!r}", expected="LABEL=VALUE", action="write it as `kubectl label` does")
    return text.partition("=")[0], text.partition("=")[2]
