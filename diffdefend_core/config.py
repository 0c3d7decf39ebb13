"""Settings: flag > `DIFFDEFEND_*` environment > configuration file > default.

Nested options use two underscores in the environment (`DIFFDEFEND_GATE__CHAMPION=best`). Secrets are no settings:
S3 keys are read from the environment where they are used and never pass through here. This module stays light: it
imports no science and no pipeline library.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, with_config
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from diffdefend_core.errors import InputError
from diffdefend_core.options import (
    DetectionOptions,
    ElijahOptions,
    EvaluationOptions,
    GateOptions,
    InversionOptions,
    PureDiffusionOptions,
    PurificationOptions,
    SigningOptions,
    TerdOptions,
)
from diffdefend_core.provenance import digest_of

PEERS = ("terd", "elijah", "purediffusion")
GROUPS = ("inversion", *PEERS, "detection", "purification", "evaluation", "gate")
SCIENCE = ("seed", "adapter", *GROUPS)
SETTABLE = (*GROUPS, "signing")
DEFAULT_FILE = "diffdefend.toml"
_FILE = "_file"

for _kind in (
    InversionOptions, TerdOptions, ElijahOptions, PureDiffusionOptions, DetectionOptions, PurificationOptions,
    EvaluationOptions, GateOptions, SigningOptions,
):  # fmt: skip
    # The options are plain dataclasses; this tells pydantic to refuse unknown names and numbers that are not finite.
    with_config(ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False))(_kind)


def _here(name: str) -> Path:
    return Path.cwd() / ".diffdefend" / name


class Settings(BaseSettings):
    """Everything that can be set. `science()` is the part that changes a result, and so what `digest()` covers.

    Build it with `load_settings` (flags and file) or `Settings.from_science` (inside a pipeline step).
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="DIFFDEFEND_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    store: str = Field(default_factory=lambda: _here("store").as_uri())
    tracking_uri: str = Field(default_factory=lambda: f"sqlite:///{_here('mlflow.db')}", min_length=1)
    experiment: str = Field(default="diffdefend", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    adapter: str = Field(default="", max_length=200)
    allow_pickles: bool = False
    allow_network: bool = False
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    inversion: InversionOptions = Field(default_factory=InversionOptions)
    terd: TerdOptions = Field(default_factory=TerdOptions)
    elijah: ElijahOptions = Field(default_factory=ElijahOptions)
    purediffusion: PureDiffusionOptions = Field(default_factory=PureDiffusionOptions)
    detection: DetectionOptions = Field(default_factory=DetectionOptions)
    purification: PurificationOptions = Field(default_factory=PurificationOptions)
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    gate: GateOptions = Field(default_factory=GateOptions)
    signing: SigningOptions = Field(default_factory=SigningOptions)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        """Return the sources, strongest first: flags, our environment, MLflow's own variable, the file."""
        flags = dict(getattr(init_settings, "init_kwargs", {}))
        below = flags.pop(_FILE, {})
        return (
            InitSettingsSource(settings_cls, init_kwargs=flags),
            env_settings,
            InitSettingsSource(settings_cls, init_kwargs=_standard_environment()),
            InitSettingsSource(settings_cls, init_kwargs=below),
        )

    @field_validator("store")
    @classmethod
    def _read_store(cls, value: str) -> str:
        if "://" not in value:
            return Path(value).expanduser().absolute().as_uri() if value else _refuse("s3:// or file:// URI")
        return value if value.startswith(("s3://", "file:///")) else _refuse("s3:// or file:// URI")

    @field_validator(*SETTABLE, mode="before")
    @classmethod
    def _read_texts(cls, value: object, info: ValidationInfo) -> object:
        """Read lists and null from the texts that flags and environment bring."""
        return {name: _from_text(item) for name, item in value.items()} if isinstance(value, dict) else value

    @field_validator("signing")
    @classmethod
    def _check_signing(cls, value: SigningOptions) -> SigningOptions:
        if not 1 <= value.valid_days <= 3650:
            raise ValueError(f"valid_days is {value.valid_days}; expected 1 to 3650")
        return value

    def science(self) -> dict[str, Any]:
        """Return what changes a result (seed, adapter and the groups of options) as plain JSON values."""
        return self.model_dump(mode="json", include=set(SCIENCE))

    def science_json(self) -> str:
        """Return `science()` as one canonical line of JSON, the form in which a pipeline hands it to its steps."""
        return json.dumps(self.science(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def digest(self) -> str:
        """Return the sha256 (hex) over `science()`: not over the store, the tracking server or the device."""
        return digest_of(self.science())

    @classmethod
    def from_science(cls, text: str, config_file: Path | None = None, **flags: Any) -> Self:
        """Return the settings of a pipeline step: `text` from `science_json`, other fields as in `load_settings`.

        Every field of `science()` must be in it, so that neither the step's environment nor another version's
        defaults can change the result. Flags win over it. Raises InputError.
        """
        given = _merge(_read_science(text), {name: flags.pop(name) for name in SCIENCE if name in flags})
        settings = load_settings(config_file, **given, **flags)
        lacking = _lacking(settings.science(), given, "")
        if lacking:
            raise InputError(
                f"the settings of the step lack {', '.join(lacking)}",
                expected="the whole of `science_json()`",
                action="compile and run the pipeline with the same version of DiffDefend",
            )
        return settings  # type: ignore[return-value]


def load_settings(config_file: Path | None = None, **flags: Any) -> Settings:
    """Return the settings from `flags` (None is "not given"), environment and file.

    The file is `config_file`, else `diffdefend.toml` in the working folder if there is one. Groups in `flags` are
    mappings (`gate={"champion": "best"}`). Raises one InputError that lists the dotted path of every mistake.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    given[_FILE] = _read_file(config_file)
    try:
        return Settings(**given)
    except ValidationError as error:
        mistakes = "; ".join(sorted(_mistake(detail) for detail in error.errors(include_url=False)))
        raise InputError(
            f"wrong settings: {mistakes}",
            expected="settings as `diffdefend config show` prints them",
            action="mend the flag, the DIFFDEFEND_* variable or the configuration file",
        ) from error


def parse_assignment(text: str) -> dict[str, Any]:
    """Return `group.field=value` as the flag it stands for. Raises InputError."""
    path, equals, value = text.partition("=")
    group, dot, field = path.strip().partition(".")
    if not equals or not dot or not field or group not in SETTABLE:
        raise InputError(
            f"--set {text!r}",
            expected=f"group.field=value with a group of {', '.join(SETTABLE)}",
            action="see `diffdefend config show` for the names",
        )
    return {group: {field: value}}


def merge_flags(*flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags merged, later ones over earlier ones, groups field by field."""
    merged: dict[str, Any] = {}
    for flag in flags:
        merged = _merge(merged, flag)
    return merged


def without_password(uri: str) -> str:
    """Return the URI without user and password, fit to be shown."""
    scheme, separator, rest = uri.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _refuse(expected: str) -> str:
    raise ValueError(f"expected an {expected}")


def _standard_environment() -> dict[str, Any]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return {"tracking_uri": uri} if uri else {}


def _from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value == "null":
        return None
    if not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        path = Path.cwd() / DEFAULT_FILE
        if not path.is_file():
            return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise _wrong_file(path, " ".join(str(error).split())) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise _wrong_file(path, "it holds no mapping of names to values")
    return {str(name): value for name, value in content.items()}


def _wrong_file(path: Path, reason: str) -> InputError:
    return InputError(
        f"configuration file {path} cannot be used: {reason}",
        expected="a TOML (.toml) or YAML file of settings",
        action="mend it or name another with --config",
    )


def _read_science(text: str) -> dict[str, Any]:
    try:
        science = json.loads(text)
    except ValueError:
        science = None
    if not isinstance(science, dict):
        raise InputError(
            f"--settings is {text[:40]!r}", expected="a JSON object", action="pass what `science_json()` returns"
        )
    strange = sorted(set(science) - set(SCIENCE))
    if strange:
        raise InputError(
            f"--settings holds {', '.join(strange)}",
            expected=f"only {', '.join(SCIENCE)}",
            action="give the others as flags or DIFFDEFEND_* variables",
        )
    return science


def _lacking(whole: Mapping[str, Any], given: Mapping[str, Any], path: str) -> list[str]:
    lacking = []
    for name, value in whole.items():
        if name not in given:
            lacking.append(f"{path}{name}")
        elif not path and isinstance(value, dict) and isinstance(given[name], dict):
            lacking += _lacking(value, given[name], f"{name}.")
    return lacking


def _mistake(detail: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path} is no setting"
    return f"{path} = {json.dumps(detail['input'], default=str)[:60]} ({detail['msg']})"
