"""An S3-compatible object store through the minio client.

The endpoint comes from DIFFDEFEND_S3_ENDPOINT, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (AWS if none is set; its scheme
decides on TLS, certificates are always verified), the region from AWS_REGION, the keys from AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN. Secrets stay out of every message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TypeVar
from xml.etree.ElementTree import ParseError

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from diffdefend_core.errors import InputError, StoreError
from diffdefend_core.io.store import CHUNK, MAX_ENTRIES, Entry, MissingObjectError

PART_SIZE = 16 << 20
PARALLEL_PARTS = 3
CONNECT_SECONDS = 3.0
READ_SECONDS = 60.0
ATTEMPTS, SILENT_ATTEMPTS = 5, 2
UNREACHABLE_SECONDS = 5.0
RESUMES = 10
AWS = "https://s3.amazonaws.com"

_ENDPOINT = re.compile(r"https?://([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?/?")
_TRANSIENT = frozenset((
    "SlowDown", "SlowDownRead", "SlowDownWrite", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling",
    # what was sent did not arrive as it was: the next try may
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "HTTP status 429 without an S3 error",
))  # fmt: skip
_MISSING = frozenset(("NoSuchKey", "NoSuchObject"))
_ACTIONS = {
    "AccessDenied": "grant these credentials access (s3:GetObject, s3:PutObject, s3:ListBucket) to it",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "ExpiredToken": "fetch new credentials (AWS_SESSION_TOKEN), then run the stage again",
    "ExpiredTokenException": "fetch new credentials (AWS_SESSION_TOKEN), then run the stage again",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "NoSuchBucket": "create the bucket or correct the URI",
    "NoSuchKey": "check the URI or rerun the stage that writes it",
}
_CLIENT_ERRORS = (MinioException, HTTPError, ParseError, UnicodeDecodeError)

Result = TypeVar("Result")


class S3Store:
    """The objects of one bucket. Transport errors, 5xx and SlowDown are retried inside; refusals are not."""

    def __init__(self, bucket: str) -> None:
        """Read the settings from the environment. Raises InputError if they are incomplete."""
        settings = os.environ
        self.bucket = bucket
        self.endpoint = _endpoint(settings)
        self._client = _client(self.endpoint, settings)

    def put(self, key: str, path: Path) -> Entry:
        """Upload a file, above 16 MiB in parts, three at a time.

        Each request carries a digest of its body, which the store compares: sha256, or MD5 over TLS.
        """
        self._retried(key, partial(self._upload, key, path))
        status = self._retried(key, partial(self._client.stat_object, self.bucket, key))
        return Entry(key=key, size=status.size or 0, tag=str(status.etag))

    def read(self, key: str) -> Iterator[bytes]:
        """Yield the object in pieces; a connection cut on the way goes on where it stopped."""
        done, resumes = 0, 0
        while True:
            response = self._retried(key, partial(self._client.get_object, self.bucket, key, offset=done))
            try:
                for chunk in response.stream(CHUNK):
                    done += len(chunk)
                    yield chunk
                return
            except HTTPError as error:
                resumes += 1
                if resumes > RESUMES:
                    raise self._failure(key, error) from error
            finally:
                response.close()
                response.release_conn()

    def entries(self, prefix: str, limit: int = MAX_ENTRIES) -> list[Entry]:
        """Return the entries whose key begins with `prefix`, sorted by key, at most `limit` of them."""
        return sorted(self._retried(prefix, partial(self._listing, prefix, limit)), key=attrgetter("key"))

    def _upload(self, key: str, path: Path) -> None:
        self._client.fput_object(self.bucket, key, str(path), part_size=PART_SIZE, num_parallel_uploads=PARALLEL_PARTS)

    def _listing(self, prefix: str, limit: int) -> list[Entry]:
        objects = self._client.list_objects(self.bucket, prefix=prefix, recursive=True)
        found = (item for item in objects if not item.is_dir)
        return [
            Entry(key=str(item.object_name), size=item.size or 0, tag=str(item.etag)) for item in islice(found, limit)
        ]

    def _retried(self, key: str, call: Callable[[], Result]) -> Result:
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=_is_hopeless,
            wait=wait_exponential_jitter(multiplier=0.2, max=10, jitter=0.5),
            reraise=True,
        )
        try:
            return retrying(call)
        except _CLIENT_ERRORS as error:
            raise self._failure(key, error) from error
        except ValueError as error:
            raise InputError(
                f"s3://{self.bucket}/{key} is not a valid name ({error})",
                expected="a bucket and key that S3 allows",
                action="correct the URI",
            ) from error

    def _failure(self, key: str, error: Exception) -> StoreError:
        where = f"s3://{self.bucket}/{key} at {self.endpoint}"
        code = _code(error)
        if code is None:
            return StoreError(
                f"{where} cannot be reached ({_transport_word(error)})",
                expected="an S3 service that answers",
                action="check DIFFDEFEND_S3_ENDPOINT or AWS_ENDPOINT_URL and the network",
            )
        kind = MissingObjectError if code in _MISSING else StoreError
        action = _ACTIONS.get(code, "check the store, then run the stage again")
        return kind(f"{where} answered {code}", expected="success", action=action)


def _endpoint(settings: Mapping[str, str]) -> str:
    names = ("DIFFDEFEND_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    name, text = next(((name, settings[name]) for name in names if settings.get(name)), ("", AWS))
    # The text is not shown: it may hold a password.
    if not _ENDPOINT.fullmatch(text):
        raise InputError(
            f"{name} is not an endpoint URL",
            expected="https://host[:port] or http://host[:port], without path or credentials",
            action=f"correct {name}",
        )
    return text.rstrip("/")


def _client(endpoint: str, settings: Mapping[str, str]) -> Minio:
    missing = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not settings.get(name)]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} not set", expected="S3 credentials in the environment", action="set them"
        )
    scheme, _, host = endpoint.partition("://")
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    return Minio(
        host,
        access_key=settings["AWS_ACCESS_KEY_ID"],
        secret_key=settings["AWS_SECRET_ACCESS_KEY"],
        session_token=settings.get("AWS_SESSION_TOKEN") or None,
        secure=scheme == "https",
        region=region or (None if endpoint == AWS else "us-east-1"),
        http_client=_pool(settings),
    )


def _pool(settings: Mapping[str, str]) -> urllib3.PoolManager:
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        maxsize=PARALLEL_PARTS + 1,
        cert_reqs="CERT_REQUIRED",
        ca_certs=settings.get("SSL_CERT_FILE") or certifi.where(),
        # A part of an upload gets one more chance by itself; whole calls are retried above.
        retries=urllib3.Retry(
            total=None,
            connect=0,
            read=1,
            redirect=0,
            other=0,
            status=1,
            backoff_factor=0.2,
            status_forcelist=(500, 502, 503, 504),
            raise_on_status=False,
        ),
    )


def _code(error: Exception) -> str | None:
    """Return the S3 error code or HTTP status that the server answered, and None if it did not answer."""
    if isinstance(error, S3Error):
        return error.code or "an error without code"
    if isinstance(error, ServerError):
        return f"HTTP status {error.status_code}"
    if isinstance(error, InvalidResponseError):
        text = str(error)
        code = re.search(r"<Code>(\w{1,64})</Code>", text)
        status = re.search(r"Response code: (\d{3})", text)
        return code[1] if code else f"HTTP status {status[1] if status else 'unknown'} without an S3 error"
    if isinstance(error, ParseError | UnicodeDecodeError | MinioException):
        return "something that is not S3"
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return not isinstance(getattr(error, "reason", None), SSLError)
    if not isinstance(error, MinioException):
        return False
    code = _code(error)
    return code in _TRANSIENT or bool(re.match(r"HTTP status 5", code or ""))


def _is_hopeless(state: RetryCallState) -> bool:
    """Stop after ATTEMPTS, or sooner when nobody accepts the connection or says a word: that rarely heals."""
    error = state.outcome.exception() if state.outcome else None
    reason = getattr(error, "reason", error)
    unreachable = isinstance(reason, ConnectTimeoutError | NewConnectionError)
    too_long = unreachable and (state.seconds_since_start or 0.0) > UNREACHABLE_SECONDS
    attempts = SILENT_ATTEMPTS if isinstance(reason, ReadTimeoutError) else ATTEMPTS
    return state.attempt_number >= attempts or too_long


def _transport_word(error: Exception) -> str:
    reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
    words: tuple[tuple[type[BaseException], str], ...] = (
        (NameResolutionError, "the host name is not known"),
        (NewConnectionError, "the connection was refused"),
        (ConnectTimeoutError, f"no answer within {CONNECT_SECONDS:.0f} s"),
        (ReadTimeoutError, f"silent for {READ_SECONDS:.0f} s"),
        (SSLError, "its TLS certificate was not accepted, or it does not speak TLS"),
    )
    return next((word for kind, word in words if isinstance(reason, kind)), type(reason).__name__)
