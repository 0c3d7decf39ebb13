"""What is present on this machine of the parts that DiffDefend can use."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from importlib import metadata
from urllib.parse import unquote, urlsplit

from diffdefend_core.config import Settings, without_password

Check = tuple[str, bool, str]

_EXTRAS = {
    "torch": "torch", "diffusers": "torch", "safetensors": "torch", "mlflow": "registry", "kfp": "pipelines",
    "kfp-kubernetes": "pipelines", "minio": "s3", "jinja2": "report", "matplotlib": "report",
    "huggingface-hub": "hub", "picklescan": "pickles",
    "securesystemslib": "signing", "cryptography": "signing", "torch-fidelity": "perceptual", "lpips": "perceptual",
}  # fmt: skip


def examine(settings: Settings) -> list[Check]:
    """Return (part, present, remark) for every part; nothing is written, no secret is shown."""
    python = (sys.version_info >= (3, 11), sys.version.split()[0])
    checks: list[Check] = [("python", *python)]
    checks += [(name, *_library(name, extra)) for name, extra in _EXTRAS.items()]
    rest: dict[str, Callable[[], tuple[bool, str]]] = {
        "device": lambda: _device(settings.device),
        "s3 credentials": _s3_credentials,
        "store": lambda: _store(settings.store),
        "mlflow store": lambda: (True, without_password(settings.tracking_uri)),
        "docker daemon": _docker,
    }
    return checks + [(name, *check()) for name, check in rest.items()]


def _library(name: str, extra: str) -> tuple[bool, str]:
    try:
        return True, metadata.version(name)
    except metadata.PackageNotFoundError:
        return False, f"pip install 'diffdefend[{extra}]'"


def _device(wanted: str) -> tuple[bool, str]:
    try:
        import torch
    except ImportError:
        return False, "needs torch"
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return not wanted.startswith("cuda") or torch.cuda.is_available(), f"{wanted}: {name}"


def _s3_credentials() -> tuple[bool, str]:
    absent = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
    endpoint = os.environ.get("DIFFDEFEND_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    return not absent, f"not set: {', '.join(absent)}" if absent else f"for {without_password(endpoint)}"


def _store(uri: str) -> tuple[bool, str]:
    if uri.startswith("s3://"):
        return True, uri
    path = unquote(urlsplit(uri).path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.access(path, os.W_OK), uri


def _docker() -> tuple[bool, str]:
    try:
        docker = importlib.import_module("docker")  # by name: the repository has a folder of that name
    except ImportError:
        return False, "pip install 'diffdefend[pipelines]'"
    try:
        client = docker.from_env(timeout=3)
        return True, f"version {client.version()['Version']}"
    except docker.errors.DockerException:
        return False, "no daemon answers (only `run --docker` needs one)"
