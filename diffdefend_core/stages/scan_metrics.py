"""What a registry scan came to, for Prometheus: pushed to a Pushgateway, or a file for node_exporter.

A nightly scan ends, so nothing could be scraped from it. All are gauges about the last whole scan: one with `only` or
`since` looked at a part of the registry, and its numbers in their place would be read as those of the whole.
"""

from __future__ import annotations

import http.client
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

from diffdefend_core.artifacts import Word
from diffdefend_core.errors import DiffDefendError, InputError
from diffdefend_core.report.registry_document import ScanSummary, Status

JOB = "diffdefend-scan-registry"
SECONDS_TO_ANSWER = 30.0

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sink:
    """Where the metrics go: the URL of a Pushgateway, or the path of a file of node_exporter's textfile collector."""

    place: str

    def __post_init__(self) -> None:
        """Raise InputError at a place that is neither."""
        if "://" in self.place:
            _check_url(self.place)
        elif not self.place.endswith(".prom") or not Path(self.place).absolute().parent.is_dir():
            raise InputError(
                f"--metrics {self.place[:200]!r} is no place for metrics",
                expected="the http(s):// URL of a Pushgateway, or a file FILE.prom in a folder that is there",
                action="correct it",
            )

    def send(self, summary: ScanSummary, champions: Callable[[], int]) -> bool:
        """Send the metrics of a whole scan, and return whether they arrived; what goes wrong is a warning.

        `champions` counts the versions in production without a decision that stands; it may raise DiffDefendError.
        """
        if summary.dry_run:
            return False
        if summary.only or summary.since:
            _LOG.warning("no metrics: --only and --since look at a part of the registry, and metrics are of the whole")
            return False
        gauges = measured(summary, _counted(champions), time.time())
        try:
            if "://" in self.place:
                # Two registries may share a Pushgateway; a push takes the place of the last one of the same registry.
                group = {"registry": summary.registry}
                push_to_gateway(self.place, JOB, gauges, grouping_key=group, timeout=SECONDS_TO_ANSWER)
            else:
                write_to_textfile(self.place, gauges)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _LOG.warning("the metrics of the scan did not get to %s: %s", self.place, error or type(error).__name__)
            return False
        return True


def measured(summary: ScanSummary, champions: float, ended: float) -> CollectorRegistry:
    """Return the gauges of a scan; `ended` is its end in seconds since 1970, NaN `champions` are not known."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, value: float) -> None:
        Gauge(f"diffdefend_scan_{name}", text, registry=registry).set(value)

    versions = Gauge("diffdefend_scan_versions", "Versions by what was done with them", ["status"], registry=registry)
    counts = summary.counts()
    for status in Status:
        versions.labels(status.value).set(counts[status.value])
    verdicts = Gauge("diffdefend_scan_verdicts", "Versions by the verdict that stands", ["verdict"], registry=registry)
    for word in Word:
        verdicts.labels(word.value).set(sum(row.verdict == word.value for row in summary.versions))
    gauge("blocked", "Versions with a decision against them", summary.blocked)
    gauge("seconds", "Time that the scan took", summary.seconds)
    gauge("unscanned_champions", "Versions in production without a decision that stands", champions)
    gauge("last_complete_timestamp_seconds", "End of the last scan of the whole registry", ended)
    return registry


def _counted(champions: Callable[[], int]) -> float:
    try:
        return float(champions())
    except DiffDefendError as error:
        _LOG.warning("the versions in production cannot be counted: %s", error.found)
        return math.nan


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        credentials = parts.username is not None
    except ValueError:
        usable, credentials = False, False
    if not usable or credentials:
        found = "holds a user and a password" if credentials else f"{url[:200]!r} is no address of a Pushgateway"
        raise InputError(
            f"--metrics {found}",
            expected="http://HOST:PORT or https://HOST:PORT, behind a gateway with its path",
            action="correct it; a Pushgateway that asks for a login needs a proxy in front that knows it",
        )
