"""The MLflow model registry: resolve a version, register one by reference, set its tags and move aliases.

A version is always a str here (MLflow gives an int or a str, depending on its backend). Weights are never copied
through MLflow and nothing is pickled: a version is a name, a source URI and tags.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffdefend_core.errors import InputError, RegistryError
from diffdefend_core.io.tracking import connect, translated, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "diffdefend.model_digest"
ATTESTATION_TAG = "diffdefend.attestation"

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[A-Za-z0-9_-]+))")
_NAME = re.compile(r"[^/:@'\"`\\\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A registered version: where its bytes lie, its name and its number."""

    source_uri: str
    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A version as the registry shows it: `created` is the time of its registration in ms since 1970.

    `source` is what it was registered with, `models:/name/version` if it is a copy; no call of MLflow changes it.
    """

    name: str
    version: str
    created: int
    source: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """`models:/name/version`."""
        return model_uri(self.name, self.version)


def resolve(tracking_uri: str, uri: str) -> Resolved:
    """Return what `models:/name/version` or `models:/name@alias` names.

    Raises InputError at another form of URI; RegistryError if the name, version or alias is not there or the registry
    cannot be reached in bounded time.
    """
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise InputError(
            f"{uri!r} is not a model URI", expected="models:/name/version or models:/name@alias", action="correct it"
        )
    name, number, alias = match["name"], match["version"], match["alias"]
    client = connect(tracking_uri)
    version = number or alias_holder(tracking_uri, name, alias)
    if version is None:
        raise _not_there(tracking_uri, f"the alias {alias!r} of the model {name!r}")
    found = _version(client, tracking_uri, name, version)
    location = download_uri(tracking_uri, name, str(found.version))
    return Resolved(source_uri=location, name=name, version=str(found.version))


def model_uri(name: str, version: str) -> str:
    """Return `models:/name/version`."""
    return f"models:/{name}/{version}"


def check_name(name: str, flag: str = "--name") -> str:
    """Return a name that a registered model can have. Raises InputError at any other, which `flag` brought."""
    if not _NAME.fullmatch(name) or name in {".", ".."} or name != name.strip():
        raise InputError(
            f"{name[:80]!r} cannot be the name of a registered model",
            expected="1 to 256 characters without / : @ \\, quotes and control characters",
            action=f"give another name ({flag})",
        )
    return name


def register_source(tracking_uri: str, name: str, source_uri: str, tags: Mapping[str, str]) -> str:
    """Register `source_uri` by reference as a new version of `name` with `tags`, and return the version.

    A version of that name with the same source and the same model digest tag is taken as it is. The digest tag alone
    would not do: whoever may write to the registry could put it on other bytes. Of two that register it at once, the
    one with the later version takes its own back: MLflow has no call that does both. Raises RegistryError, InputError.
    """
    check_name(name)
    client = connect(tracking_uri)
    with translated(tracking_uri):
        if not _is_registered(client, name):
            _create_model(client, name)
        held = _first_of(client, name, source_uri, tags.get(DIGEST_TAG))
        if held is not None:
            return held
        made = str(client.create_model_version(name, source_uri, tags=dict(tags), await_creation_for=60).version)
        first = _first_of(client, name, source_uri, tags.get(DIGEST_TAG)) or made
        if first != made:
            client.delete_model_version(name, made)
    return first


def download_uri(tracking_uri: str, name: str, version: str) -> str:
    """Return where the bytes of a version lie; for a copy, where those of its source lay when it was made.

    Raises RegistryError.
    """
    client = connect(tracking_uri)
    with translated(tracking_uri):
        return str(client.get_model_version_download_uri(name, version))


def copy_version(tracking_uri: str, name: str, version: str, to: str) -> tuple[str, bool]:
    """Copy `models:/name/version` into the registered model `to`; return the new version, and whether it was made now.

    This is MLflow's own copying: the source of the copy is `models:/name/version`, its location and tags are those of
    the version at this moment, and no bytes move. A copy that is there already is taken as it is, unless the name was
    deleted and registered anew since. Of two that copy at once, the one with the later version takes its own back.
    Raises InputError, RegistryError.
    """
    check_name(to, "--to")
    client = connect(tracking_uri)
    with translated(tracking_uri):
        held = _copy_in(client, name, version, to)
        if held is not None:
            return held, False
        with contextlib.redirect_stderr(io.StringIO()):  # MLflow prints what it does; its errors are raised
            made = str(client.copy_model_version(model_uri(name, version), to).version)
        first = _copy_in(client, name, version, to) or made
        if first != made:
            client.delete_model_version(to, made)
    return first, first == made


def copied_from(source: str) -> tuple[str, str] | None:
    """Return (name, version) of the version that a version with this source is a copy of, None if it is no copy."""
    match = _MODEL_URI.fullmatch(source)
    return (match["name"], match["version"]) if match is not None and match["version"] else None


def find_version(tracking_uri: str, name: str, version: str) -> Listed | None:
    """Return a version, None if it is not there or may not be read. Raises RegistryError at any other answer."""
    try:
        found = _find(connect(tracking_uri), tracking_uri, name, version)
    except RegistryError as error:
        if _code(error) == "PERMISSION_DENIED":
            return None
        raise
    return _listed(found) if found is not None else None


def version_of(tracking_uri: str, name: str, version: str) -> Listed:
    """Return a version. Raises RegistryError if it is not there."""
    return _listed(_version(connect(tracking_uri), tracking_uri, name, version))


def tags_of(tracking_uri: str, name: str, version: str) -> dict[str, str]:
    """Return the tags of a version. Raises RegistryError if it is not there."""
    return dict(_version(connect(tracking_uri), tracking_uri, name, version).tags)


def mark(tracking_uri: str, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version. Raises RegistryError if it is not there or the registry refuses."""
    client = connect(tracking_uri)
    with translated(tracking_uri):
        for tag, text in tags.items():
            client.set_model_version_tag(name, version, tag, text)


def unmark(tracking_uri: str, name: str, version: str, tag: str) -> None:
    """Remove a tag of a version if it is there. Raises RegistryError."""
    if tag in tags_of(tracking_uri, name, version):
        client = connect(tracking_uri)
        with translated(tracking_uri):
            client.delete_model_version_tag(name, version, tag)


def model_names(tracking_uri: str) -> tuple[str, ...]:
    """Return the names of all registered models, sorted. Raises RegistryError."""
    client = connect(tracking_uri)
    names: list[str] = []
    token = None
    with translated(tracking_uri):
        while True:
            page = client.search_registered_models(max_results=1000, page_token=token)
            names += [str(model.name) for model in page]
            token = page.token
            if not token:
                return tuple(sorted(names))


def all_versions(tracking_uri: str, *, page: int = 500) -> Iterator[Listed]:
    """Yield every version of every registered model, by name and number; `page` of them are fetched at a time.

    Filters of MLflow are not used: `tags.x != 'y'` leaves out the versions without the tag. Raises RegistryError.
    """
    client = connect(tracking_uri)
    token = None
    order = ["name ASC", "version_number ASC"]
    while True:
        with translated(tracking_uri):
            found = client.search_model_versions(max_results=page, order_by=order, page_token=token)
        for item in found:
            yield _listed(item)
        token = found.token
        if not token:
            return


def all_aliases(tracking_uri: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the aliases of each (name, version) that has any, in one listing. Raises RegistryError."""
    client = connect(tracking_uri)
    held: dict[tuple[str, str], list[str]] = {}
    token = None
    while True:
        with translated(tracking_uri):
            found = client.search_registered_models(max_results=500, page_token=token)
        for model in found:
            for alias, version in model.aliases.items():
                held.setdefault((str(model.name), str(version)), []).append(str(alias))
        token = found.token
        if not token:
            return {place: tuple(sorted(names)) for place, names in held.items()}


def alias_holder(tracking_uri: str, name: str, alias: str) -> str | None:
    """Return the version that the alias points at, None if none. Raises RegistryError if the model is not there."""
    return aliases(tracking_uri, name).get(alias)


def aliases_of(tracking_uri: str, name: str, version: str) -> tuple[str, ...]:
    """Return the aliases of a version, sorted: from the registered model, because a search never returns them."""
    return tuple(sorted(alias for alias, holder in aliases(tracking_uri, name).items() if holder == version))


def move_alias(tracking_uri: str, name: str, alias: str, version: str) -> None:
    """Let the alias point at the version, wherever it pointed before. Raises RegistryError."""
    client = connect(tracking_uri)
    with translated(tracking_uri):
        client.set_registered_model_alias(name, alias, version)


def drop_alias(tracking_uri: str, name: str, alias: str, version: str) -> bool:
    """Remove the alias if it points at the version; return whether it did. Raises RegistryError."""
    if alias_holder(tracking_uri, name, alias) != version:
        return False
    client = connect(tracking_uri)
    with translated(tracking_uri):
        client.delete_registered_model_alias(name, alias)
    return True


def aliases(tracking_uri: str, name: str) -> dict[str, str]:
    """Return the version that each alias of the model points at. Raises RegistryError if the model is not there."""
    client = connect(tracking_uri)
    try:
        with translated(tracking_uri):
            held = client.get_registered_model(name).aliases
    except RegistryError as error:
        if _code(error) == "RESOURCE_DOES_NOT_EXIST":
            raise _not_there(tracking_uri, f"the model {name!r}") from error
        raise
    return {str(alias): str(version) for alias, version in held.items()}


def _version(client: MlflowClient, tracking_uri: str, name: str, version: str) -> ModelVersion:
    found = _find(client, tracking_uri, name, version)
    if found is None:
        raise _not_there(tracking_uri, f"version {version} of the model {name!r}")
    return found


def _find(client: MlflowClient, tracking_uri: str, name: str, version: str) -> ModelVersion | None:
    try:
        with translated(tracking_uri):
            return client.get_model_version(name, version)
    except RegistryError as error:
        if _code(error) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _code(error: RegistryError) -> str | None:
    """Return the word by which MLflow names what went wrong, None if it was not MLflow that said it."""
    code = getattr(error.__cause__, "error_code", None)
    return str(code) if code is not None else None


def _listed(item: ModelVersion) -> Listed:
    return Listed(
        name=str(item.name), version=str(item.version), created=int(item.creation_timestamp or 0),
        source=str(item.source), tags=dict(item.tags),
    )  # fmt: skip


def _copy_in(client: MlflowClient, name: str, version: str, to: str) -> str | None:
    """Return the lowest version of `to` that is a copy of this one and lies where it lies, None if there is none."""
    location = client.get_model_version_download_uri(name, version)
    numbers = [
        int(held.version)
        for held in _versions(client, to)
        if str(held.source) == model_uri(name, version)
        and client.get_model_version_download_uri(to, str(held.version)) == location
    ]
    return str(min(numbers)) if numbers else None


def _first_of(client: MlflowClient, name: str, source_uri: str, digest: str | None) -> str | None:
    """Return the lowest version with this source and digest tag, None if there is none."""
    numbers = [
        int(held.version)
        for held in _versions(client, name)
        if str(held.source).rstrip("/") == source_uri.rstrip("/") and held.tags.get(DIGEST_TAG) == digest
    ]
    return str(min(numbers)) if numbers else None


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _is_registered(client: MlflowClient, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        # Another process made it in between: what was wanted is there.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _not_there(tracking_uri: str, what: str) -> RegistryError:
    return RegistryError(
        f"{what} is not in the registry {without_credentials(tracking_uri)}",
        expected="a registered one",
        action="check the name and the tracking URI",
    )
