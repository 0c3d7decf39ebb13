"""What is there: families, samplers, attacks and methods, as rows for `diffdefend list`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdefend_core.scope import NOT_COVERED

Row = dict[str, Any]


def families() -> list[Row]:
    """Return the families that load by themselves, and the adapters that are installed."""
    from diffdefend_core.loading.adapters import installed
    from diffdefend_core.loading.families import FAMILIES

    rows: list[Row] = [
        {"name": row.word, "process": row.process, "pipelines": sorted(row.pipelines), "schedulers": row.schedulers}
        for row in FAMILIES
    ]
    return rows + [{"name": name, "process": "adapter", "pipelines": [], "schedulers": []} for name in installed()]


def samplers() -> list[Row]:
    """Return the samplers with the processes they fit and their usual number of steps."""
    from diffdefend_core.diffusion.samplers import TABLE

    return [
        {
            "name": entry.name,
            "processes": sorted(entry.processes),
            "steps": entry.steps,
            "stochastic": entry.stochastic,
            "source": entry.source,
        }
        for entry in TABLE
    ]


def attacks() -> list[Row]:
    """Return the attacks that can be planted, and those that no search of the initial noise covers."""
    from diffdefend_core.attacks.plans import TABLE

    rows: list[Row] = [
        {
            "name": entry.name,
            "processes": sorted(entry.processes),
            "paints": entry.paints,
            "in_scope": True,
            "source": entry.source,
        }
        for entry in TABLE
    ]
    return rows + [
        {"name": name, "processes": [], "paints": "", "in_scope": False, "source": f"not covered: {what}"}
        for name, what in NOT_COVERED
    ]


def methods() -> list[Row]:
    """Return the methods of detection."""
    from diffdefend_core.stages.methods import METHODS

    return [{"name": name, "source": method.source} for name, method in METHODS.items()]


KINDS: dict[str, Callable[[], list[Row]]] = {
    "families": families, "samplers": samplers, "attacks": attacks, "methods": methods,
}  # fmt: skip
