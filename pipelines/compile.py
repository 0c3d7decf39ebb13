"""Compile a pipeline for a cluster: as KFP YAML, or as the objects of KFP's Kubernetes-native API."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from components.image import image
from diffdefend_core.errors import InputError
from pipelines.gate import gate_pipeline
from pipelines.placement import Placement
from pipelines.scan import scan_pipeline

PIPELINES: dict[str, Callable] = {"gate": gate_pipeline, "scan": scan_pipeline}
_PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")
_VERSION_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The names in the objects `Pipeline` and `PipelineVersion`; InputError for one that Kubernetes refuses."""

    version: str
    namespace: str = ""

    def __post_init__(self) -> None:
        for name in (self.version, *filter(None, [self.namespace])):
            if not _VERSION_NAME.fullmatch(name) or len(name) > 253:
                raise InputError(
                    f"object name {name!r}",
                    expected="lower-case letters, digits, '-' and '.', and a letter or digit at either end",
                    action="rename it",
                )


def compile_gate(path: Path, *, science: str, gpu: bool = False) -> None:
    """Write the gate as KFP YAML to `path`; with `gpu` its heavy tasks ask for an accelerator."""
    compile_pipeline("gate", path, science=science, placement=Placement(gpu=gpu))


def compile_pipeline(
    kind: str, path: Path, *, science: str, placement: Placement, manifest: Manifest | None = None,
    require_digests: bool = False,
) -> None:  # fmt: skip
    """Write the pipeline `kind` (`gate` or `scan`) as YAML to `path`, with `manifest` as Kubernetes objects.

    `science` is `Settings.science_json()`: what a run of the pipeline uses unless it is given other settings.

    Raises InputError if the file name is not one of YAML, the file cannot be written, or, with `require_digests`, an
    image has no digest.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"output file {path}", expected="a name that ends in .yaml", action="rename it")
    if require_digests:
        _check_digests()
    options = None
    if manifest is not None:
        options = KubernetesManifestOptions(
            pipeline_version_name=manifest.version, namespace=manifest.namespace or None, include_pipeline_manifest=True
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(
            PIPELINES[kind](placement, science), str(path), kubernetes_manifest_options=options,
            kubernetes_manifest_format=manifest is not None,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", expected="a writable place", action="pick another"
        ) from error


@contextmanager
def compiled(kind: str, *, science: str, placement: Placement, require_digests: bool = False) -> Iterator[Path]:
    """Yield the pipeline as a file of KFP YAML that is there while the context is open. Raises InputError."""
    with tempfile.TemporaryDirectory(prefix="diffdefend-compile-") as folder:
        path = Path(folder) / f"{kind}.yaml"
        compile_pipeline(kind, path, science=science, placement=placement, require_digests=require_digests)
        yield path


def _check_digests() -> None:
    loose = sorted(name for name in map(image, ("cpu", "gpu")) if not _PINNED.search(name))
    if loose:
        raise InputError(
            f"images without a digest: {', '.join(loose)}", expected="registry/name@sha256:…",
            action="set DIFFDEFEND_IMAGE_CPU and DIFFDEFEND_IMAGE_GPU to what `docker push` printed",
        )  # fmt: skip
