"""Where a task runs and what it may use: limits, accelerator, retries, time-out, credentials by reference."""

from dataclasses import dataclass

from kfp import dsl, kubernetes

CONFIG_MAP = "diffdefend"
S3_SECRET = "diffdefend-s3"
MLFLOW_SECRET = "diffdefend-mlflow"
MLFLOW_READ_SECRET = "diffdefend-mlflow-read"
_CONFIGURATION = {
    "store": "DIFFDEFEND_STORE",
    "tracking-uri": "DIFFDEFEND_TRACKING_URI",
    "s3-endpoint": "DIFFDEFEND_S3_ENDPOINT",
    "s3-region": "AWS_REGION",
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the tasks of a pipeline are placed on a cluster; kfp.local ignores all but `retries`."""

    gpu: bool = False
    retries: int = 2
    minutes: int = 240

    def light(self, task: dsl.PipelineTask, *, registry: str = "") -> dsl.PipelineTask:
        """Place a task that needs no torch; with `registry`, the name of a secret, it talks to MLflow, uncached."""
        self._common(task, cpu="1", memory="2Gi", minutes=min(30, self.minutes))
        if registry:
            task.set_caching_options(enable_caching=False)
            names = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
            kubernetes.use_secret_as_env(task, registry, names, optional=True)
        return task

    def heavy(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Place a task that computes with torch: on an accelerator with `gpu`, with enough shared memory."""
        self._common(task, cpu="4", memory="16Gi", minutes=self.minutes)
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit="4Gi")
        if self.gpu:
            task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
            kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
        return task

    def _common(self, task: dsl.PipelineTask, *, cpu: str, memory: str, minutes: int) -> None:
        task.set_cpu_request("500m").set_cpu_limit(cpu).set_memory_request("1Gi").set_memory_limit(memory)
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        kubernetes.set_timeout(task, minutes * 60)
        kubernetes.set_security_context(task, run_as_user=10001, run_as_non_root=True)
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, _CONFIGURATION, optional=True)
        keys = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
        kubernetes.use_secret_as_env(task, S3_SECRET, keys, optional=True)
