"""Where the policy comes from: shipped with the package, a file, a URI, or carried in the settings themselves.

A container sees no file of the machine that started the pipeline. So a local file is read where the pipeline is
started, and its content travels in the settings; an `s3://` URI is read by the register stage through the store. In
every case the digest of a decision is that of the content that was used.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from diffdefend_core.config import Settings
from diffdefend_core.errors import InputError
from diffdefend_core.gate.judge import in_words
from diffdefend_core.gate.policy import (
    MAX_BYTES,
    Mistakes,
    Policy,
    PolicyRule,
    build_policy,
    parse_policy,
    shipped_policy,
    timestamp,
    usable,
)
from diffdefend_core.gate.rules import FIXED_IN_WORDS
from diffdefend_core.io.store import MissingObjectError, local_path, open_store

SHIPPED = "shipped"
MAX_CARRIED = 7000


def read_policy(settings: Settings) -> Policy:
    """Return the policy that the settings name. Raises InputError if it is not there or has mistakes."""
    given = settings.gate.policy
    try:
        if not isinstance(given, str):
            return build_policy(given)
        return shipped_policy() if given == SHIPPED else parse_policy(read_text(given))
    except Mistakes as error:
        raise usable(error, given if isinstance(given, str) else "in the settings") from error


def settled(settings: Settings) -> Settings:
    """Return the settings with the content of a local policy file in the place of its path.

    Raises InputError if there is no such file, it has mistakes, or it is too long for a pipeline's parameter.
    """
    given = settings.gate.policy
    if not isinstance(given, str) or given == SHIPPED or given.startswith("s3://"):
        return settings
    content = read_policy(settings).content()
    length = len(json.dumps(content, separators=(",", ":")))
    if length > MAX_CARRIED:
        raise InputError(
            f"the policy {given} has {length} characters as JSON",
            expected=f"at most {MAX_CARRIED}, because it travels as a parameter of the pipeline",
            action="put it into the store and name it as s3://bucket/policy.yaml, or remove expired waivers",
        )
    return settings.model_copy(update={"gate": dataclasses.replace(settings.gate, policy=content)})


def read_text(path_or_uri: str) -> bytes:
    """Return the content of a policy file, at most one byte more than a policy may have. Raises InputError."""
    path = local_path(path_or_uri) if "://" in path_or_uri else Path(path_or_uri).expanduser()
    if path is None:
        return _from_store(path_or_uri)
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _absent(path_or_uri, error.strerror or str(error)) from error


def _from_store(uri: str) -> bytes:
    folder, _, name = uri.rpartition("/")
    if not PurePosixPath(name).name:
        raise _absent(uri, "it names a folder")
    store, prefix = open_store(folder)
    content = b""
    try:
        for chunk in store.read(prefix + name):
            content += chunk
            if len(content) > MAX_BYTES:
                break
    except MissingObjectError as error:
        raise _absent(uri, "it is not there") from error
    return content


def _absent(where: str, reason: str) -> InputError:
    return InputError(
        f"the policy {where} cannot be read: {reason}",
        expected="`shipped`, a YAML file, or an s3:// or file:// URI of one",
        action="correct the path (gate.policy)",
    )


def remarks(policy: Policy) -> list[str]:
    """Return what is no mistake but should be looked at: waivers that have expired, and rules that only warn."""
    now = datetime.now(UTC)
    lines = [
        f"waivers[{index}] of {waiver.owner} for {waiver.rule} expired on {timestamp(waiver.expires)}: it is void"
        for index, waiver in enumerate(policy.waivers)
        if not waiver.holds(now)
    ]
    return lines + [f"{rule.id} only warns" for rule in policy.rules if rule.severity == "warn"]


def explained(policy: Policy) -> dict[str, Any]:
    """Return the policy in words: its digest, a row for each rule, the fixed ones first, and one for each waiver."""
    now = datetime.now(UTC)
    rows = [{"rule": name, "asks": text, "when": "always", "if_it_fails": "block"} for name, text in FIXED_IN_WORDS]
    rows += [_row(rule) for rule in policy.rules]
    waivers = [
        {
            "waiver": waiver.rule,
            "model": waiver.model_digest[:12],
            "owner": waiver.owner,
            "statement": waiver.statement,
            "expires": timestamp(waiver.expires),
            "holds": waiver.holds(now),
        }
        for waiver in policy.waivers
    ]
    return {"digest": policy.digest(), "rules": rows, "waivers": waivers}


def _row(rule: PolicyRule) -> dict[str, str]:
    bound = {"value": "", "low": ", low end", "high": ", high end", "worst": ", worst end"}
    own = rule.self_reference_bound
    asks = f"{in_words(rule)}{bound[rule.bound]}"
    asks += f"{bound[own] or ', value'} where the model is its own reference" if own else ""
    asks += f", n at least {rule.min_n}" if rule.min_n > 1 else ""
    when = {"always": "always", "repaired": "after a repair", "trigger_known": "after a repair, true trigger known"}
    return {"rule": rule.id, "asks": asks, "when": when[rule.when], "if_it_fails": rule.severity}
