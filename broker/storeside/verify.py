"""Whether a token allows a request. Pure: the keys and the time are arguments.

Rules:

* Only ES256, RS256 and EdDSA, and only as the key's own kind says; ``alg`` never chooses how a key is used.
* The key is looked up by ``kid`` among the given keys and nowhere else; ``jku``, ``jwk``, ``x5u`` and ``x5c`` are ignored, ``crit``
  is refused (RFC 7515 section 4.1.11: nothing critical is understood here).
* One spelling per token: three base64url segments without padding, and a signature that encodes back to itself.
* Issuer, audience, method and path are compared exactly; GET covers HEAD. `LEEWAY_SECONDS` applies to nbf and exp.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jwt
import orjson

from broker.claims import ALGORITHMS, LEEWAY_SECONDS, MAX_TOKEN_LENGTH, InvalidToken, TransferToken, from_claims
from broker.storeside.refused import Refused

Keys = Mapping[str, jwt.PyJWK]
"""The issuer's published keys by kid."""

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_KIND = {"ES256": ("EC", "P-256"), "RS256": ("RSA", None), "EdDSA": ("OKP", "Ed25519")}
_SMALLEST_RSA = 2048


class UnknownKey(Refused):
    """The token names a key that is not among those given. Fetching them anew may help, once."""

    def __init__(self) -> None:
        super().__init__(401, "the token's key is unknown", {"WWW-Authenticate": "Bearer"})


def keys_of(document: Any) -> Keys:
    """The usable keys of a JWKS (RFC 7517 section 5). Keys of other kinds or for other uses are left out.

    Raises `ValueError` when `document` is no key set or has no usable key.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("not a JWKS")
    keys = dict(_usable(entries))
    if not keys:
        raise ValueError("no usable key in the JWKS")
    return keys


def _usable(entries: Iterable[Any]) -> Iterable[tuple[str, jwt.PyJWK]]:
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or entry.get("use", "sig") != "sig":
            continue
        kinds = [name for name, (kty, crv) in _KIND.items() if entry.get("kty") == kty and crv in (None, entry.get("crv"))]
        if len(kinds) != 1 or entry.get("alg", kinds[0]) != kinds[0]:
            continue
        try:
            key = jwt.PyJWK({name: value for name, value in entry.items() if name != "d"}, algorithm=kinds[0])
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue
        if kinds[0] == "RS256" and key.key.key_size < _SMALLEST_RSA:
            continue
        yield entry["kid"], key


def verify(token: str, method: str, path: str, *, audience: str, issuer: str, keys: Keys, now: float) -> TransferToken:
    """What `token` grants, when it allows `method` on `path` (absolute, percent-decoded, without query) at `now`.

    Raises `Refused`: 401 when the token proves nothing here and now (`UnknownKey` when its key is not among `keys`), 403 when
    it proves something else than what is asked.
    """
    grant = _proven(token, keys)
    if grant.issuer != issuer:
        raise _unproven("the token is from another issuer")
    if grant.audience != audience:
        raise _unproven("the token is for another store")
    if now < grant.not_before - LEEWAY_SECONDS:
        raise _unproven("the token is not valid yet")
    if now >= grant.expires_at + LEEWAY_SECONDS:
        raise _unproven("the token has expired")
    if grant.method != ("GET" if method == "HEAD" else method):
        raise Refused(403, "the token is for another method")
    if grant.path != path:
        raise Refused(403, "the token is for another path")
    return grant


def _proven(token: str, keys: Keys) -> TransferToken:
    """The claims, once the signature has been found right."""
    if len(token) > MAX_TOKEN_LENGTH or _COMPACT.match(token) is None:
        raise _unproven("the token is malformed")
    header, payload, signature = token.split(".")
    meta = _object(header)
    algorithm, kid = meta.get("alg"), meta.get("kid")
    if algorithm not in ALGORITHMS or "crit" in meta or "b64" in meta or not isinstance(kid, str):
        raise _unproven("the token's header is not acceptable")
    key = keys.get(kid)
    if key is None:
        raise UnknownKey
    if key.algorithm_name != algorithm:
        raise _unproven("the token's algorithm is not its key's")
    raw = _decoded(signature)
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != signature:
        raise _unproven("the token is malformed")
    if not key.Algorithm.verify(f"{header}.{payload}".encode(), key.key, raw):
        raise _unproven("the token's signature is wrong")
    try:
        return from_claims(_object(payload))
    except InvalidToken as error:
        raise _unproven(f"the token's claims are not acceptable: {error}") from None


def _object(segment: str) -> dict[str, Any]:
    try:
        value = orjson.loads(_decoded(segment))
    except orjson.JSONDecodeError:
        raise _unproven("the token is malformed") from None
    if not isinstance(value, dict):
        raise _unproven("the token is malformed")
    return value


def _decoded(segment: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise _unproven("the token is malformed") from None


def _unproven(reason: str) -> Refused:
    return Refused(401, reason, {"WWW-Authenticate": "Bearer"})
