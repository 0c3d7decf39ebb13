"""Ed25519 keys and signed envelopes (DSSE), by securesystemslib; the cryptography is imported where it is needed.

A key id is the sha256 over the public key as securesystemslib writes it. A private key is a PEM text (PKCS#8, without
passphrase); no message here ever holds a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from diffdefend_core.errors import InputError, MissingExtraError
from diffdefend_core.gate.statement import Reason

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE = 1 << 20


class KeyPair(NamedTuple):
    """A new key: its id, the private part and the public part as PEM."""

    key_id: str
    private_pem: bytes
    public_pem: bytes


def generate_key() -> KeyPair:
    """Return a new Ed25519 key. Raises MissingExtraError without the library."""
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    from securesystemslib.signer import SSlibKey

    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    return KeyPair(
        str(SSlibKey.from_crypto(public).keyid),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def read_signer(pem: bytes, where: str) -> CryptoSigner:
    """Return the signer of a private key; `where` names its place in messages. Raises InputError."""
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise _no_key(where, "private") from None  # the cause may quote what was read
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(where, "private")
    return CryptoSigner(key)


def read_public_key(pem: bytes, where: str) -> SSlibKey:
    """Return the public key of a PEM file. Raises InputError, also if it holds a private key."""
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    if b"PRIVATE KEY" in pem:
        raise InputError(
            f"{where} holds a private key",
            expected="public keys only, as `diffdefend key generate` writes them into *.pub",
            action="remove it, and make a new key if others could read it",
        )
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise _no_key(where, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(where, "public")
    return SSlibKey.from_crypto(key)


def sign(payload: bytes, signer: CryptoSigner) -> str:
    """Return the signed envelope as one line of JSON."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":"))


def verified_payload(
    text: str, keys: Mapping[str, SSlibKey], revoked: Collection[str]
) -> tuple[bytes | None, list[Reason]]:
    """Return the payload if a trusted key that is not revoked signed the envelope, else None and the reasons."""
    _require()
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import Error

    try:
        if len(text) > MAX_ENVELOPE:
            raise ValueError(f"longer than {MAX_ENVELOPE} characters")
        envelope = Envelope.from_dict(json.loads(text))
        if not envelope.signatures:
            raise ValueError("no signature")
    except (Error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, [Reason("unreadable", f"the signed decision is damaged or cut off ({type(error).__name__})")]
    if envelope.payload_type != PAYLOAD_TYPE:
        return None, [Reason("unreadable", f"the envelope holds {envelope.payload_type[:80]!r}, not {PAYLOAD_TYPE}")]
    reasons = [_objection(envelope, key_id, keys, revoked) for key_id in sorted(envelope.signatures)]
    found = [reason for reason in reasons if reason is not None]
    return (envelope.payload, []) if len(found) < len(reasons) else (None, found)


def _objection(
    envelope: Envelope, key_id: str, keys: Mapping[str, SSlibKey], revoked: Collection[str]
) -> Reason | None:
    """Return why the signature of this key does not count, None if it does."""
    from securesystemslib.exceptions import UnverifiedSignatureError

    if key_id in revoked:
        return Reason("revoked-key", f"it is signed by the key {key_id[:12]}, which is revoked")
    if key_id not in keys:
        return Reason("unknown-key", f"it is signed by the key {key_id[:12]}, which is not among the trusted keys")
    try:
        keys[key_id].verify_signature(envelope.signatures[key_id], envelope.pae())
    except UnverifiedSignatureError:
        return Reason("bad-signature", f"the signature of the key {key_id[:12]} does not fit: the decision was changed")
    return None


def _no_key(where: str, kind: str) -> InputError:
    return InputError(
        f"{where} is no {kind} key that can be used",
        expected=f"an Ed25519 {kind} key as PEM, without passphrase",
        action="make one with `diffdefend key generate --to FOLDER`",
    )


def _require() -> None:
    try:
        import cryptography  # noqa: F401
        import securesystemslib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{error.name} is not installed", expected="the signing extra", action="pip install 'diffdefend[signing]'"
        ) from error
