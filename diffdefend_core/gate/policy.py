"""The policy of the gate: rules over measured values, and waivers, as a file that is reviewed like code.

A policy is YAML (or JSON). It is read strictly: unknown names, names given twice, numbers that are not finite and
texts in the place of numbers are mistakes, and all mistakes are found at once. `Policy.digest()` covers the rules
alone. A waiver speaks about one model, so that adding one changes the decisions about that model only; a decision
lists the waivers that it used, and `gate check` asks whether they still stand in the policy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from importlib import resources
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from diffdefend_core.errors import InputError
from diffdefend_core.provenance import digest_of

FIXED_RULES = ("verdict-clean", "records-agree", "metrics-there")
SHARES = ("asr", "asr_known", "probability")
MAX_BYTES = 256 << 10
SHOWN = 6

_METRIC = re.compile(
    r"scorecard\.(before|after)\.[a-z][a-z0-9_]*|verdict\.probability|verdict\.statistics\.[a-z][a-z0-9_]*\.(value|score)"
)


class Mistakes(ValueError):
    """Raised by `parse_policy`: `lines` holds one line for each mistake, each with its dotted path."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("; ".join(self.lines))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class PolicyRule(_Strict):
    """One rule: which value is compared with what, when it is asked, and what follows.

    Exactly one of `threshold`, `max_absolute_change` and `max_relative_change` is given. The two changes compare
    `scorecard.after` with `scorecard.before`: with `at_most` the metric may rise by so much through a repair, with
    `at_least` it may fall by so much. A change is in the metric's own unit, or a share of the value before.

    `bound` says which end of the bootstrap interval counts: the `value`, its `low` or `high` end, or the `worst` for
    the model; the low end of a change is `after.low` against `before.high`. `self_reference_bound` takes its place
    where the FID is measured against the model's own samples. Fewer than `min_n` samples are no measurement.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    metric: str
    when: Literal["always", "repaired", "trigger_known"] = "always"
    direction: Literal["at_most", "at_least"]
    threshold: float | None = None
    max_absolute_change: Annotated[float, Field(ge=0)] | None = None
    max_relative_change: Annotated[float, Field(ge=0)] | None = None
    bound: Literal["value", "low", "high", "worst"] = "value"
    self_reference_bound: Literal["value", "low", "high", "worst"] | None = None
    min_n: Annotated[int, Field(ge=1)] = 1
    severity: Literal["block", "warn"] = "block"

    @field_validator("id")
    @classmethod
    def _not_fixed(cls, value: str) -> str:
        if value in FIXED_RULES:
            raise ValueError("this rule always holds; a policy can neither change nor repeat it")
        return value

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if not _METRIC.fullmatch(value):
            raise ValueError(
                "expected scorecard.before.NAME, scorecard.after.NAME, verdict.probability "
                "or verdict.statistics.NAME.value|score"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        limits = (self.threshold, self.max_absolute_change, self.max_relative_change)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("expected exactly one of threshold, max_absolute_change, max_relative_change")
        if self.is_change and not self.metric.startswith("scorecard.after."):
            raise ValueError("a change against the original needs a metric of scorecard.after")
        if self.metric.startswith("scorecard.after.") and self.when == "always":
            raise ValueError("scorecard.after is there after a repair only; expected when: repaired or trigger_known")
        plain = self.bound == "value" and self.self_reference_bound is None and self.min_n == 1
        if self.metric.startswith("verdict.") and not plain:
            raise ValueError("a value of the verdict has no interval and no n; leave out bound and min_n")
        return self

    @property
    def is_change(self) -> bool:
        """Whether the rule limits a change against the original."""
        return self.threshold is None

    @property
    def limit(self) -> float:
        """The number that the rule compares with."""
        given = (self.threshold, self.max_absolute_change, self.max_relative_change)
        return next(limit for limit in given if limit is not None)


def _expiry(value: object) -> object:
    """Read a date as the end of that day in UTC, and a text as a date or a time."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        except ValueError:
            return value
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time(23, 59, 59), UTC)
    return value


class Waiver(_Strict):
    """Somebody answers for one failing rule of one model until a date.

    `model_digest` is that of the model that leaves the gate. `expires` is a time with its zone, or a date, which means
    the end of that day in UTC. A waiver lets a rule fail; it does not stand in for a value that was not measured.
    """

    rule: str
    model_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    statement: Annotated[str, Field(min_length=10, max_length=500)]
    owner: Annotated[str, Field(min_length=1, max_length=200)]
    expires: Annotated[AwareDatetime, BeforeValidator(_expiry)]

    @field_serializer("expires")
    def _plain_time(self, value: datetime) -> str:
        return timestamp(value)

    def digest(self) -> str:
        """Return the sha256 (hex) over all fields: a waiver that is changed is another one."""
        return digest_of(self.model_dump(mode="json"))

    def holds(self, now: datetime) -> bool:
        """Whether the waiver has not expired at `now` (with its zone)."""
        return now < self.expires


class Policy(_Strict):
    """What is asked of a model beside the rules that always hold."""

    version: Annotated[int, Field(ge=1, le=1)]
    rules: Annotated[tuple[PolicyRule, ...], Field(strict=False)]
    waivers: Annotated[tuple[Waiver, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [rule.id for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        unknown = sorted({waiver.rule for waiver in self.waivers} - set(names))
        lines = [f"two rules have the id {name!r}" for name in twice]
        lines += [f"a waiver names {name!r}, which is no rule of this policy" for name in unknown]
        if lines:
            raise ValueError("; ".join(lines))
        return self

    def content(self) -> dict[str, Any]:
        """Return the whole policy as plain JSON values, defaults included: the form in which it travels."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Return the sha256 (hex) over the rules with all their defaults; waivers have digests of their own."""
        return digest_of({"version": self.version, "rules": self.content()["rules"]})


def timestamp(moment: datetime) -> str:
    """Return a time as `2026-01-31T12:00:00Z`, in UTC and whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shipped_policy() -> Policy:
    """Return the policy that comes with the package."""
    return parse_policy((resources.files("diffdefend_core.gate") / "policies" / "shipped.yaml").read_bytes())


def parse_policy(text: str | bytes) -> Policy:
    """Read a policy from YAML or JSON. Raises Mistakes with one line for each mistake."""
    if len(text) > MAX_BYTES:
        raise Mistakes([f"the file has {len(text)} bytes; expected at most {MAX_BYTES}"])
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader that is stricter still
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Mistakes([f"it is no YAML that can be read: {' '.join(str(error).split())[:300]}"]) from error
    return build_policy(value)


def build_policy(value: object) -> Policy:
    """Return the policy of plain values. Raises Mistakes with one line for each mistake."""
    if not isinstance(value, Mapping):
        raise Mistakes([f"it holds {type(value).__name__}; expected a mapping with version, rules and waivers"])
    try:
        return Policy.model_validate(dict(value))
    except ValidationError as error:
        raise Mistakes(sorted(_line(detail) for detail in error.errors(include_url=False))) from error


def usable(mistakes: Mistakes, where: str) -> InputError:
    """Return the one-line error of a policy at `where` that cannot be used."""
    count = len(mistakes.lines)
    found = "a mistake" if count == 1 else f"{count} mistakes"
    shown = "; ".join(mistakes.lines[:SHOWN]) + ("; and more" if count > SHOWN else "")
    return InputError(
        f"the policy {where} has {found}: {shown}",
        expected="a policy as docs/gate.md describes it",
        action="mend it; `diffdefend policy check FILE` lists one mistake a line",
    )


class _Loader(yaml.SafeLoader):
    """Refuses a name given twice, of which YAML silently takes the last, and aliases, which hide what is compared."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _line(detail: Mapping[str, Any]) -> str:
    path = ""
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{path} is no field of a policy"
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "string_type":
        message = "expected a text; put it in quotes"
    if isinstance(detail["input"], dict | list):
        return f"{path}: {message}" if path else message
    shown = json.dumps(detail["input"], default=str, ensure_ascii=False)[:60]
    return f"{path} = {shown}: {message}"
