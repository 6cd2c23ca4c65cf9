"""JWTs as an attacker writes them: any header, any payload, any signature, without a library that would refuse to."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from broker.sign.token import SigningKey

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def segment(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def unsegment(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def written(value: Any) -> str:
    """Any JSON as a segment."""
    return segment(value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode())


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Header, payload and signature of an honest token."""
    header, payload, signature = token.split(".")
    return json.loads(unsegment(header)), json.loads(unsegment(payload)), signature


def rewritten(token: str, changes: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> str:
    """An honest token with other claims, and its old signature. ``...`` leaves a claim out."""
    head, payload, signature = parts(token)
    return f"{written(_merged(head, header or {}))}.{written(_merged(payload, changes))}.{signature}"


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**values, **changes}.items() if value is not ...}


def signed(header: Any, payload: Any, key: Any) -> str:
    """A token with that header and payload, signed with `key`: a private key in its own way, bytes by HMAC, ``None`` not at all."""
    body = f"{written(header)}.{written(payload)}"
    return f"{body}.{segment(signature(body.encode(), key, header.get('alg', '') if isinstance(header, Mapping) else ''))}"


def signature(body: bytes, key: Any, algorithm: str = "") -> bytes:
    if key is None:
        return b""
    if isinstance(key, bytes):
        digest = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(algorithm, hashlib.sha256)
        return hmac.new(key, body, digest).digest()
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(body, padding.PKCS1v15(), hashes.SHA256())
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    return key.sign(body)


def other_spellings(token: str) -> dict[str, str]:
    """The same token, its signature written otherwise; each must be refused, for a token has one spelling."""
    header, payload, sign = token.split(".")
    body, raw = f"{header}.{payload}", unsegment(sign)
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    last = _ALPHABET[_ALPHABET.index(sign[-1]) ^ 1]
    return {
        "padded": f"{body}.{sign}==",
        "unused last bits": f"{body}.{sign[:-1]}{last}",
        "plain base64": f"{body}.{base64.b64encode(raw).decode().rstrip('=').replace('+', '%2B').replace('/', '%2F')}"
        if "-" in sign or "_" in sign
        else f"{body}.%2B{sign[1:]}",
        "DER": f"{body}.{segment(encode_dss_signature(r, s))}",
        "a byte more": f"{body}.{segment(raw + bytes(1))}",
        "zeros before r and s": f"{body}.{segment(bytes(1) + raw[:32] + bytes(1) + raw[32:])}",
        "a line feed": f"{body}.{sign}%0A",
        "a space": f"{body}.{sign}%20",
        "a fourth segment": f"{token}.",
        "header padded": f"{header}=.{payload}.{sign}",
        "hexadecimal": f"{body}.{raw.hex()}",
    }


def high_s(token: str) -> str:
    """The other signature that every ECDSA signature implies: s replaced by n - s."""
    body, _, sign = token.rpartition(".")
    raw = unsegment(sign)
    s = _P256_ORDER - int.from_bytes(raw[32:], "big")
    return f"{body}.{segment(raw[:32] + s.to_bytes(32, 'big'))}"


def secrets_from(key: SigningKey, jwk: Mapping[str, str]) -> dict[str, bytes]:
    """What is public of a key, in the forms that a confused verifier might take for an HMAC secret."""
    public = key.private.public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = public.public_bytes(serialization.Encoding.PEM, spki)
    return {
        "PEM": pem,
        "PEM without its last line end": pem.rstrip(),
        "DER": public.public_bytes(serialization.Encoding.DER, spki),
        "JWK": json.dumps(jwk).encode(),
        "JWK, compact": json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode(),
        "x": unsegment(jwk["x"]),
        "x as text": jwk["x"].encode(),
        "kid": key.id.encode(),
        "nothing": b"",
    }
