"""The gauge of versions in production that no decision vouches for."""

from __future__ import annotations

from pathlib import Path

from diffdefend_core.config import Settings
from diffdefend_core.errors import RegistryError
from diffdefend_core.io import registry
from diffdefend_core.stages.gatekeeper import Gatekeeper
from diffdefend_core.webhook.metrics import Metrics

NAME = "diffdefend_unscanned_champions"


def shown(metrics: Metrics) -> str:
    return next(line.split()[1] for line in metrics.text().decode().splitlines() if line.startswith(f"{NAME} "))


def test_a_champion_without_a_signed_decision_is_counted(tmp_path: Path) -> None:
    settings = Settings(store=f"file://{tmp_path}/store", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for name, alias in (("faces", "champion"), ("digits", "challenger")):
        version = registry.register_source(settings.tracking_uri, name, f"s3://m/{name}", {registry.DIGEST_TAG: "x"})
        registry.move_alias(settings.tracking_uri, name, alias, version)
    assert Gatekeeper(settings).undecided("champion") == 1
    assert Gatekeeper(settings).undecided("staging") == 0


def test_the_registry_is_asked_now_and_then_and_its_silence_is_no_zero() -> None:
    metrics, moments, answers = Metrics(), [0.0], [2, 0]

    def count() -> int:
        if not answers:
            raise RegistryError("no answer", expected="one", action="wait")
        return answers.pop(0)

    metrics.watch(count, every=60.0, clock=lambda: moments[-1])
    assert shown(metrics) == shown(metrics) == "2.0"
    moments.append(61.0)
    assert shown(metrics) == "0.0"
    moments.append(130.0)
    assert shown(metrics) == "NaN"
