"""The gate for each model of a small list, in one run.

kfp fails the whole loop when one model fails, and does not retry tasks inside it; a run of its own for each model has
neither fault. So the list is short, and a registry is scanned by `diffdefend scan-registry`.
"""

from collections.abc import Callable
from dataclasses import replace

from kfp import dsl

from pipelines.gate import gate_pipeline
from pipelines.placement import Placement

NAME = "diffdefend-scan"
LONGEST = 20


def scan_pipeline(
    placement: Placement = Placement(),  # noqa: B008 (frozen)
    science: str = "",
    parallelism: int = 2,
) -> Callable[..., dsl.PipelineTask]:
    """Return the pipeline that sends each of `sources` through the gate, `parallelism` at a time."""
    gate = gate_pipeline(replace(placement, keep_hours=0), science)

    @dsl.pipeline(
        name=NAME,
        description=f"Gate each model of a list of at most {LONGEST}.",
        pipeline_config=placement.pipeline_config(),
    )
    def scan(sources: list[str], settings: str = science, store: str = ""):
        with dsl.ParallelFor(sources, parallelism=parallelism) as source:
            gate(source=source, settings=settings, store=store, name="")

    return scan
