"""Signing keys and the tokens that they sign: transfer tokens for stores, bearer tokens for the broker's own API.

Life of a key: published as soon as it exists; signs from `activates_at` until `retires_at`, the newest such key first;
stays published until `expires_at`, which no token that it signed outlives.

ES256 is the default because every verifying front knows it (nginx with njs and HAProxy know no EdDSA).
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.claims import TransferToken

Algorithm = Literal["ES256", "RS256", "EdDSA"]
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

RSA_BITS = 3072
_ECDSA_SHA256 = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key with its life (POSIX seconds). `id` is the ``kid``: the RFC 7638 thumbprint of the public key."""

    id: str
    algorithm: Algorithm
    private: PrivateKey = field(repr=False)
    activates_at: float = 0.0
    retires_at: float = math.inf
    expires_at: float = math.inf


def generate_key(
    algorithm: Algorithm, now: float, *, activates_at: float | None = None, retires_at: float = math.inf, expires_at: float = math.inf
) -> SigningKey:
    """A fresh key, active from `now` unless `activates_at` says later."""
    private: PrivateKey
    if algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    elif algorithm == "RS256":
        private = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    else:
        private = ed25519.Ed25519PrivateKey.generate()
    return _signing_key(private, now if activates_at is None else activates_at, retires_at, expires_at)


def to_pem(key: SigningKey, passphrase: bytes) -> bytes:
    """The private key as PKCS #8, encrypted with `passphrase`. The key's life is not part of it."""
    return key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(passphrase)
    )


def from_pem(
    pem: bytes, passphrase: bytes, *, activates_at: float = 0.0, retires_at: float = math.inf, expires_at: float = math.inf
) -> SigningKey:
    """Undo `to_pem`. Raises `ValueError` for a wrong passphrase, broken PEM, or a kind of key that is not used here."""
    try:
        private = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError):
        raise ValueError("the signing key cannot be read: wrong passphrase or damaged PEM") from None
    if not isinstance(private, PrivateKey):
        raise ValueError("the signing key must be EC P-256, RSA or Ed25519")
    return _signing_key(private, activates_at, retires_at, expires_at)


def public_jwk(key: SigningKey) -> dict[str, str]:
    """The public half as a JWK (RFC 7517)."""
    return _jwk_members(key.private) | {"kid": key.id, "alg": key.algorithm, "use": "sig"}


def jwks(keys: Iterable[SigningKey]) -> dict[str, list[dict[str, str]]]:
    """The published key set."""
    return {"keys": [public_jwk(key) for key in keys]}


class NoSigningKey(Exception):
    """No key may sign this now: none is active, or the token would outlive every one."""


class TokenSigner:
    """Signs with whichever of `keys` is due. Immutable: a rotation makes a new one."""

    def __init__(self, keys: Sequence[SigningKey], issuer: str) -> None:
        self.issuer = issuer
        newest_first = sorted(keys, key=lambda key: key.activates_at, reverse=True)
        self._keys = [(key, _segment(orjson.dumps({"alg": key.algorithm, "kid": key.id, "typ": "JWT"})) + b".") for key in newest_first]

    def sign(self, token: TransferToken, now: float) -> str:
        """The token as a JWT. Raises `NoSigningKey`, and `ValueError` when it names another issuer."""
        if token.issuer != self.issuer:
            raise ValueError("the token names another issuer")
        return self._sign(token.to_claims(), now)

    def sign_claims(self, claims: dict[str, Any], now: float) -> str:
        """Any claims as a JWT of this issuer, for instance a bearer token for the API; ``exp`` is required. Raises `NoSigningKey`."""
        return self._sign({**claims, "iss": self.issuer}, now)

    def _sign(self, claims: dict[str, Any], now: float) -> str:
        expires_at = claims["exp"]
        for key, header in self._keys:
            if key.activates_at <= now < key.retires_at and expires_at <= key.expires_at:
                body = header + _segment(orjson.dumps(claims))
                return (body + b"." + _segment(_signature(key.private, body))).decode()
        raise NoSigningKey("no signing key is active that outlives the token")


def _signature(private: PrivateKey, body: bytes) -> bytes:
    """The JWS signature (RFC 7518 sections 3.3 and 3.4, RFC 8037)."""
    if isinstance(private, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(private.sign(body, _ECDSA_SHA256))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(body, padding.PKCS1v15(), hashes.SHA256())
    return private.sign(body)


def _signing_key(private: PrivateKey, activates_at: float, retires_at: float, expires_at: float) -> SigningKey:
    algorithm = _algorithm(private)
    members = _jwk_members(private)
    # RFC 7638: the required members alone, sorted, without white space.
    thumbprint = hashlib.sha256(orjson.dumps(members, option=orjson.OPT_SORT_KEYS)).digest()
    return SigningKey(_segment(thumbprint).decode(), algorithm, private, activates_at, retires_at, expires_at)


def _algorithm(private: PrivateKey) -> Algorithm:
    if isinstance(private, ec.EllipticCurvePrivateKey):
        if not isinstance(private.curve, ec.SECP256R1):
            raise ValueError("the signing key must be EC P-256, RSA or Ed25519")
        return "ES256"
    return "RS256" if isinstance(private, rsa.RSAPrivateKey) else "EdDSA"


def _jwk_members(private: PrivateKey) -> dict[str, str]:
    """What RFC 7518 section 6 and RFC 8037 require of a public key."""
    if isinstance(private, ec.EllipticCurvePrivateKey):
        point = private.public_key().public_numbers()
        return {"kty": "EC", "crv": "P-256", "x": _number(point.x, 32), "y": _number(point.y, 32)}
    if isinstance(private, rsa.RSAPrivateKey):
        public = private.public_key().public_numbers()
        return {"kty": "RSA", "e": _number(public.e), "n": _number(public.n)}
    return {"kty": "OKP", "crv": "Ed25519", "x": _segment(private.public_key().public_bytes_raw()).decode()}


def _number(value: int, width: int | None = None) -> str:
    return _segment(value.to_bytes(width or (value.bit_length() + 7) // 8, "big")).decode()


def _segment(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
