"""What an interrupted registry scan leaves behind, so that the next call goes on where it stopped.

The registry's tags say what is decided. The journal holds the rest: the versions that a scan has dealt with, failures
included, and the runs on a cluster that it has begun, so that a scan that is taken up again repeats none. It lies in
the store, one or two small objects for each version.
"""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from diffdefend_core.errors import ArtifactError
from diffdefend_core.gate.policy import timestamp
from diffdefend_core.io.store import MissingObjectError, open_store
from diffdefend_core.provenance import digest_of
from diffdefend_core.report.registry_document import ScanRow
from diffdefend_core.stages.dispatch import Job

FOLDER = "registry_scan"
RESUMED_WITHIN = timedelta(hours=12)

_LOG = logging.getLogger(__name__)


class Journal:
    """The journal of the scans of one scope: the same registry, settings and filters.

    `scan` names the current one; `resumed` says whether it was begun by an earlier call, less than 12 hours ago.
    Raises StoreError.
    """

    def __init__(self, store_uri: str, scope: object, now: datetime) -> None:
        self.folder = f"{store_uri.rstrip('/')}/{FOLDER}/{digest_of(scope)[:16]}/"
        self._store, self._prefix = open_store(self.folder)
        state = self._read("state.json")
        self.resumed = _is_open(state, now)
        if self.resumed:
            self.scan, self.started = str(state["scan"]), str(state["started"])
        else:
            self.scan, self.started = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}", timestamp(now)
            self._state(finished=False)

    def rows(self) -> dict[tuple[str, str], ScanRow]:
        """Return what the scan has dealt with already, by name and version."""
        if not self.resumed:
            return {}
        found = {}
        prefix = f"{self._prefix}{self.scan}/rows/"
        for entry in self._store.entries(prefix):
            try:
                row = ScanRow.from_dict(self._read(entry.key.removeprefix(self._prefix)))
            except ArtifactError as error:
                _LOG.warning("the journal's %s is ignored: %s", entry.key, error.found)
                continue
            found[row.model, row.version] = row
        return found

    def begun(self) -> dict[Job, str]:
        """Return the ids of the runs that `begin` has noted."""
        if not self.resumed:
            return {}
        entries = self._store.entries(f"{self._prefix}{self.scan}/begun/")
        found = [self._read(entry.key.removeprefix(self._prefix)) or {} for entry in entries]
        return {
            Job(name=str(note["model"]), version=str(note["version"])): str(note["run"])
            for note in found
            if {"model", "version", "run"} <= note.keys()
        }

    def begin(self, job: Job, run: str) -> None:
        """Note the run of a version, which goes on if this process ends."""
        note = {"model": job.name, "version": job.version, "run": run}
        self.write(f"begun/{_key(job.name, job.version)}.json", json.dumps(note) + "\n")

    def add(self, row: ScanRow) -> None:
        """Note what became of a version."""
        self.write(f"rows/{_key(row.model, row.version)}.json", row.to_json())

    def write(self, name: str, text: str) -> str:
        """Put a file into the scan's folder and return its URI."""
        self._put(f"{self.scan}/{name}", text)
        return f"{self.folder}{self.scan}/{name}"

    def close(self) -> None:
        """Mark the scan as finished: the next call begins a new one."""
        self._state(finished=True)

    def _state(self, *, finished: bool) -> None:
        state = {"scan": self.scan, "started": self.started, "finished": finished}
        self._put("state.json", json.dumps(state, sort_keys=True) + "\n")

    def _put(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory(prefix="diffdefend-journal-") as folder:
            path = Path(folder) / "object"
            path.write_text(text, encoding="utf-8")
            self._store.put(f"{self._prefix}{name}", path)

    def _read(self, name: str) -> Any:
        """Return the JSON of an object, None if it is not there or cannot be read as such."""
        try:
            return json.loads(b"".join(self._store.read(f"{self._prefix}{name}")))
        except MissingObjectError:
            return None
        except (ValueError, RecursionError):
            _LOG.warning("%s%s is damaged and ignored", self.folder, name)
            return None


def _key(name: str, version: str) -> str:
    return digest_of([name, version])[:32]


def _is_open(state: Any, now: datetime) -> bool:
    if not isinstance(state, dict) or state.get("finished") is not False:
        return False
    try:
        begun = datetime.fromisoformat(str(state["started"]))
        return isinstance(state["scan"], str) and "/" not in state["scan"] and now - begun < RESUMED_WITHIN
    except (ValueError, KeyError, TypeError):
        return False
