"""A registry with signed decisions for tests: real folders, a real MLflow on sqlite, real keys, a made-up scan."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import sample_records as sample

from diffdefend_core.artifacts import Action, ModelRef, Scorecard, Word
from diffdefend_core.config import Settings
from diffdefend_core.io import folders, registry
from diffdefend_core.options import GateOptions, SigningOptions
from diffdefend_core.records import Record
from diffdefend_core.stages.folder import parent, read_record
from diffdefend_core.stages.keep import keep
from diffdefend_core.stages.keys import write_key
from diffdefend_core.stages.load import load
from diffdefend_core.stages.register import register

FIXTURE = Path(__file__).parents[1] / "zoo" / "digits" / "tuned-a1"


class World:
    """One registry, one store, one key; `policy` is given to the gate of every model."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.key = write_key(place / "keys")
        self.settings = Settings(
            store=f"file://{place}/store",
            tracking_uri=f"sqlite:///{place}/mlflow.db",
            signing=SigningOptions(key_file=self.key["private_file"], trusted_keys=str(place / "keys")),
        )

    @property
    def uri(self) -> str:
        return self.settings.tracking_uri

    def flags(self, **signing: str) -> list[str]:
        """Return the flags of the command line under which the world's decisions hold, with changes."""
        given = {"trusted_keys": str(self.place / "keys"), **signing}
        settings = [word for name, value in given.items() for word in ("--set", f"signing.{name}={value}")]
        return ["--tracking-uri", self.uri, "--store", self.settings.store, *settings]

    def model(self, name: str) -> Path:
        """Return the folder of a new model: the clean fixture, and a note that makes its bytes its own."""
        folder = self.place / "models" / name
        shutil.copytree(FIXTURE, folder)
        (folder / "NOTE.txt").write_text(name)
        return folder

    def version(self, name: str, folder: Path) -> str:
        """Register the folder as a new version, as a team would before it uses DiffDefend."""
        return registry.register_source(self.uri, name, folder.as_uri(), {registry.DIGEST_TAG: folder.name})

    def decided(
        self, name: str, version: str, *, word: Word = Word.CLEAN, policy: Any = "shipped", now: datetime | None = None,
        signed: bool = True, valid_days: int = 90, target: str | None = None,
    ) -> str:  # fmt: skip
        """Let the gate decide on a version after a scan that found `word`, and return the URI of the decision."""
        given = self.settings.model_copy(
            update={
                "store": f"file://{self.place}/store/{name}-{version}",
                "gate": GateOptions(policy=policy),
                "signing": SigningOptions(
                    key_file=self.key["private_file"] if signed else "", valid_days=valid_days
                ),
            }
        )  # fmt: skip
        model_uri = load(registry.model_uri(name, version), settings=given)
        digest = read_record(ModelRef, model_uri, "model_ref").digest
        chain = [("load", model_uri)]
        trigger = _write(given, "invert_trigger", ("inverted_trigger", sample.trigger(False, digest)), chain)
        chain.append(("invert_trigger", trigger))
        verdict = _write(given, "detect", ("verdict", sample.verdict(word, digest)), chain)
        chain.append(("detect", verdict))
        uris = dict(zip(("model_uri", "trigger_uri", "verdict_uri"), (uri for _, uri in chain), strict=True))
        if word is Word.CLEAN:
            stage, candidate = "keep", keep(**uris, settings=given)
        else:
            stage = "quarantine"
            candidate = _write(given, stage, ("candidate", sample.candidate(Action.QUARANTINE, **uris)), chain)
        card: Scorecard = sample.scorecard()
        scorecard = _write(given, "evaluate", ("scorecard", card), [(stage, candidate)])
        return register(candidate, scorecard, settings=given, name=target, now=now)


def _write(settings: Settings, stage: str, record: tuple[str, Record], parents: list[tuple[str, str]]) -> str:
    folder = Path(settings.store.removeprefix("file://")) / "filled" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record[0]}.json").write_text(record[1].to_json(), encoding="utf-8")
    uri = f"{settings.store}/{stage}/k/"
    folders.publish(folder, uri, stage=stage, key="k", producer="test", parents=[parent(*named) for named in parents])
    return uri
