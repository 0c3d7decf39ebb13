"""What the evaluation compares with: the model's own samples, an npz file, a folder of images or a trusted model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffdefend_core.artifacts import ModelRef, Parent
from diffdefend_core.config import Settings
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.errors import InputError
from diffdefend_core.evaluation import Extractor, Reference, from_features, from_images, from_npz, plain_images
from diffdefend_core.evaluation.reference import MAX_NPZ_BYTES
from diffdefend_core.io.store import MAX_ENTRIES, Entry, ObjectStore, open_store, to_uri
from diffdefend_core.progress import Progress
from diffdefend_core.stages.folder import parent, read_record
from diffdefend_core.stages.load import load
from diffdefend_core.stages.model import fetch_denoiser

SELF_SEED = 20_000
MAX_IMAGE_BYTES = 64 << 20
SUFFIXES = (".png", ".jpg", ".jpeg")

Make = Callable[[Denoiser, Extractor, Progress], tuple[Reference, int]]


@dataclass(frozen=True)
class ReferenceSet:
    """A reference that is named but not measured yet.

    `name` is for people, `digest` (sha256, hex) names its content; `parents` are the stage folders that it rests on.
    `make(model, extractor, progress)` returns it with the number of images that had to be painted for it.
    """

    name: str
    digest: str
    make: Make
    parents: tuple[Parent, ...] = ()


def read_small(uri: str, limit: int = MAX_NPZ_BYTES) -> bytes:
    """Return the file at a URI or path, nothing for the empty string. Raises InputError if absent or too large."""
    if not uri:
        return b""
    folder, _, name = to_uri(uri).rpartition("/")
    store, prefix = open_store(f"{folder}/")
    return _bounded(store, f"{prefix}{name}", limit)


def reference_set(model: ModelRef, settings: Settings) -> ReferenceSet:
    """Return the reference that the settings name, read as far as its digest needs.

    Raises InputError if there is none of these at its place, or a model that is of another family or shape.
    """
    named = settings.evaluation.reference
    if named == "self":
        return ReferenceSet("the model's own samples on other seeds", "", _own(settings))
    if not named.startswith("models:"):
        store, prefix = open_store(to_uri(named).rstrip("/") + "/")
        entries = [] if named.endswith(".npz") else store.entries(prefix, MAX_ENTRIES)
        if not entries:
            return _file(named)
        images = [entry for entry in entries if entry.key.lower().endswith(SUFFIXES)]
        is_model = f"{prefix}model_index.json" in {entry.key for entry in entries}
        if images and not is_model:
            return _pictures(named, store, prefix, images)
        if not is_model and not settings.adapter:
            raise InputError(
                f"evaluation.reference is {named}, which holds no images and no model",
                expected="`self`, an npz file, a folder with PNG or JPEG files, or a model",
                action="check the path or URI",
            )
    return _trusted(named, model, settings)


def _file(named: str) -> ReferenceSet:
    content = read_small(named)
    digest = hashlib.sha256(content).hexdigest()
    name = f"{named.rsplit('/', 1)[-1]} (sha256 {digest[:12]})"
    return ReferenceSet(name, digest, lambda _model, chosen, _progress: (from_npz(content, chosen, name), 0))


def _own(settings: Settings) -> Make:
    def make(model: Denoiser, chosen: Extractor, progress: Progress) -> tuple[Reference, int]:
        images = plain_images(model, settings.evaluation, settings.seed + SELF_SEED, progress)
        name = "the model's own samples on other seeds"
        return from_features([chosen.features(images)], chosen, name), len(images)

    return make


def _pictures(named: str, store: ObjectStore, prefix: str, entries: list[Entry]) -> ReferenceSet:
    """Return the reference of the images of a folder; they are read twice, so that they need not fit the memory."""

    def contents() -> Iterator[tuple[str, bytes]]:
        for entry in entries:
            yield entry.key.removeprefix(prefix), _bounded(store, entry.key, MAX_IMAGE_BYTES)

    digest = hashlib.sha256()
    for key, content in contents():
        digest.update(f"{hashlib.sha256(content).hexdigest()}  {key}\n".encode())
    words = digest.hexdigest()
    name = f"{len(entries)} images of {named.rstrip('/').rsplit('/', 1)[-1]} (sha256 {words[:12]})"

    def make(model: Denoiser, chosen: Extractor, _progress: Progress) -> tuple[Reference, int]:
        return from_images(contents, model.picture_shape, chosen, name), 0

    return ReferenceSet(name, words, make)


def _trusted(named: str, model: ModelRef, settings: Settings) -> ReferenceSet:
    """Return the reference that another model paints, on seeds that the evaluated one does not use."""
    uri = load(named, settings=settings)
    other = read_record(ModelRef, uri, "model_ref")
    if other.digest == model.digest:
        raise InputError(
            "evaluation.reference is the model itself",
            expected="another model that you trust",
            action="name its clean parent, or `self` for its own samples",
        )
    if (other.family, tuple(other.shape)) != (model.family, tuple(model.shape)):
        raise InputError(
            f"evaluation.reference is {other.family} {tuple(other.shape)}",
            expected=f"{model.family} {tuple(model.shape)}, as the model",
            action="name another model, or images of this shape",
        )
    name = f"samples of the model {other.name} (digest {other.digest[:12]})"

    def make(_model: Denoiser, chosen: Extractor, progress: Progress) -> tuple[Reference, int]:
        trusted = fetch_denoiser(uri, settings.device, settings.adapter)
        images = plain_images(trusted, settings.evaluation, settings.seed + SELF_SEED, progress)
        return from_features([chosen.features(images)], chosen, name), len(images)

    return ReferenceSet(name, other.digest, make, (parent("load", uri),))


def _bounded(store: ObjectStore, key: str, limit: int) -> bytes:
    content = bytearray()
    for chunk in store.read(key):
        content += chunk
        if len(content) > limit:
            raise InputError(
                f"{key} has more than {limit} bytes", expected="a smaller file", action="check that it is the right one"
            )
    return bytes(content)
