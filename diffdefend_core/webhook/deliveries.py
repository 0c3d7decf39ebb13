"""Whether a delivery is MLflow's own, fresh and new, and which version it is about.

MLflow signs `<delivery id>.<timestamp>.<body>` with HMAC-SHA256 and sends `v1,<base64>` in X-MLflow-Signature. A retry
of MLflow repeats id and timestamp, so an id is taken once, and remembered for longer than a timestamp is accepted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from diffdefend_core.errors import InputError
from diffdefend_core.io.registry import check_name
from diffdefend_core.stages.dispatch import Job

WINDOW = 300.0
MAX_BODY = 1 << 20
REMEMBERED = 100_000
# Tags are left out: the gate sets them itself, and would call itself.
EVENTS = {("model_version", "created"), ("model_version_alias", "created")}

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


class RefusedError(Exception):
    """Raised for a delivery that is not taken; `status` is that of the HTTP answer, the text its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Deliveries:
    """Checks deliveries against the secret, and remembers the ids that were taken."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._taken: OrderedDict[str, float] = OrderedDict()

    def verify(self, headers: Mapping[str, str], body: bytes, now: float) -> str:
        """Return the id of a delivery that was signed with the secret within the window around `now` (Unix seconds).

        Raises RefusedError: 401 without a valid signature, 400 outside of the window.
        """
        delivery, stamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
        signature = headers.get("x-mlflow-signature", "")
        signed = f"{delivery}.{stamp}.".encode() + body
        expected = "v1," + base64.b64encode(hmac.new(self._secret, signed, hashlib.sha256).digest()).decode()
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise RefusedError(401, "the signature does not fit")
        if not _ID.fullmatch(delivery) or not re.fullmatch(r"[0-9]{1,12}", stamp):
            raise RefusedError(400, "delivery id or timestamp cannot be read")
        if abs(now - int(stamp)) > WINDOW:
            raise RefusedError(400, f"the timestamp is more than {WINDOW:.0f} s away from the clock here")
        return delivery

    def is_new(self, delivery: str, now: float) -> bool:
        """Return whether the id was not taken before."""
        while self._taken and next(iter(self._taken.values())) < now - 3 * WINDOW:
            self._taken.popitem(last=False)
        return delivery not in self._taken

    def take(self, delivery: str, now: float) -> None:
        """Remember the id: after the work is queued, so that MLflow may repeat what was not. Raises RefusedError."""
        if len(self._taken) >= REMEMBERED:
            raise RefusedError(503, "too many deliveries in a short time")
        self._taken[delivery] = now


def subject(body: bytes) -> Job | None:
    """Return the version that an event is about, None for an event that asks for nothing. Raises RefusedError."""
    try:
        event: Any = json.loads(body)
        kind, data = (event["entity"], event["action"]), event["data"]
        if kind not in EVENTS:
            return None
        name, version = data["name"], str(data["version"])
        if not isinstance(name, str) or not _VERSION.fullmatch(version):
            raise ValueError("name or version")
        return Job(name=check_name(name), version=version)
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise RefusedError(400, f"the body is no event of MLflow ({type(error).__name__})") from error
