"""Whether a token allows a request. Pure: the request, the keys and the time are arguments.

Rules of the token:

* Only ES256, RS256 and EdDSA, and only as the key's own kind says; ``alg`` never chooses how a key is used.
* The key is looked up by ``kid`` among the given keys and nowhere else; ``jku``, ``jwk``, ``x5u`` and ``x5c`` are ignored, ``crit``
  is refused (RFC 7515 section 4.1.11: nothing critical is understood here).
* One spelling per token: three base64url segments without padding, and a signature that encodes back to itself.
* Issuer, audience, method and path are compared exactly; GET covers HEAD. The path is one that can be read in one way only
  (`broker.storeside.target`).
* nbf is stretched by the leeway, exp never: by this machine's clock, nothing begins after the instant that the ticket states. What
  has begun may end.

Rules of the request, looked at before its body:

* Fields that say where the message ends or whom it is for come once; Content-Length and Transfer-Encoding exclude each other
  (RFC 9112 section 6.1), and the only transfer coding is chunked.
* No field asks for another method or path than the request's own.
* GET, HEAD and DELETE have no body. A PUT holds all that its token is for: no Content-Range, no content coding; where ``len`` is
  bound, Content-Length says just that. What the body really is (its length, its digest) is for who reads it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
import orjson

from broker.claims import ALGORITHMS, LEEWAY_SECONDS, MAX_TOKEN_LENGTH, InvalidToken, TransferToken, from_claims
from broker.storeside.refused import Refused, unproven
from broker.storeside.target import Headers, check_path, pairs

Keys = Mapping[str, jwt.PyJWK]
"""The issuer's published keys by kid."""

MAX_KEYS = 100
"""More are no key set of a broker, and would take their time to be read."""

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_KIND = {"ES256": ("EC", "P-256"), "RS256": ("RSA", None), "EdDSA": ("OKP", "Ed25519")}
_SMALLEST_RSA = 2048
_LENGTH = re.compile(r"[0-9]{1,18}\Z")

_ONCE = frozenset(
    ("authorization", "content-encoding", "content-length", "content-range", "content-type", "expect", "host", "if-range", "range",
     "transfer-encoding")
)  # fmt: skip
_MISLEADING = frozenset(("x-http-method", "x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url"))
"""With these some frameworks are told to act on another method or path than those that were verified."""


class UnknownKey(Refused):
    """The token names a key that is not among those given. Fetching them anew may help, once."""

    def __init__(self) -> None:
        super().__init__(401, "the token's key is unknown", {"WWW-Authenticate": "Bearer"}, "key")


def keys_of(document: Any) -> Keys:
    """The usable keys of a JWKS (RFC 7517 section 5). Keys of other kinds or for other uses are left out.

    Raises `ValueError` when `document` is no key set or has more than `MAX_KEYS`.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("not a JWKS")
    if len(entries) > MAX_KEYS:
        raise ValueError("too many keys in the JWKS")
    return dict(_usable(entries))


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


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do: its token's claims, the id of the key that signed them, and its body's length in bytes as far as it is
    stated (0 without a body, nothing when it comes in chunks)."""

    token: TransferToken
    key: str
    body_length: int | None


def verify(
    token: str,
    method: str,
    path: str,
    headers: Headers,
    jwks: Keys | Mapping[str, Any],
    now: float,
    *,
    audience: str,
    issuer: str,
    leeway: float = LEEWAY_SECONDS,
) -> Grant:
    """What `token` grants, when it allows `method` on `path` (absolute, percent-decoded, without query) at `now` (POSIX seconds).

    `headers` are the request's, as a mapping or pairs; a field that came twice must be there twice. `jwks` is the issuer's key set
    as a document, or what `keys_of` made of it: parse it once. `leeway` stretches nbf (seconds).

    Raises `Refused`: 401 when the token proves nothing here and now (`UnknownKey` when its key is not among `jwks`), 403 when it
    proves something else than what is asked, 400, 411 or 415 when the request cannot be what the token allows or can be read in two
    ways, 503 when `jwks` has no usable key.
    """
    fields = pairs(headers)
    _check_once(fields)
    check_path(path)
    proven, key = _proven(token, _keys(jwks))
    if proven.issuer != issuer:
        raise unproven("the token is from another issuer", "issuer")
    if proven.audience != audience:
        raise unproven("the token is for another store", "audience")
    if now < proven.not_before - leeway:
        raise unproven("the token is not valid yet", "early")
    if now >= proven.expires_at:
        raise unproven("the token has expired", "expired")
    if proven.method != ("GET" if method == "HEAD" else method):
        raise Refused(403, "the token is for another method", why="method")
    if proven.path != path:
        raise Refused(403, "the token is for another path", why="path")
    return Grant(proven, key, _body_length(method, dict(fields), proven))


# --- the request ---


def _check_once(fields: Iterable[tuple[str, str]]) -> None:
    seen = set[str]()
    for name, _ in fields:
        if name in _MISLEADING:
            raise Refused(400, f"{name} is not understood here")
        if name in _ONCE and name in seen:
            raise Refused(400, f"{name} is given twice")
        seen.add(name)


def _body_length(method: str, fields: Mapping[str, str], token: TransferToken) -> int | None:
    """How long the body will be, as far as the request says, once nothing in that is against the token."""
    length = _stated_length(fields)
    if method in ("GET", "HEAD", "DELETE"):
        if length != 0:
            raise Refused(400, f"a {method} has no body")
        return 0
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "bodies are taken as they are, without a content coding")
    if method == "PUT":
        if "content-range" in fields:
            raise Refused(400, "a PUT holds the whole; ranges are written by parts")
        if token.length is not None and "content-length" not in fields:
            raise Refused(411, "the token binds the length, so the request must state it")
        if token.length is not None and length != token.length:
            raise Refused(400, "the body is not as long as the token says")
    return length


def _stated_length(fields: Mapping[str, str]) -> int | None:
    """RFC 9112 section 6.3: 0 without either field, nothing when the body comes in chunks."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if length is not None or coding.lower() != "chunked":
            raise Refused(400, "Transfer-Encoding may be chunked, without Content-Length")
        return None
    if length is None:
        return 0
    if _LENGTH.match(length) is None:
        raise Refused(400, "Content-Length is no number")
    return int(length)


# --- the token ---


def _keys(jwks: Keys | Mapping[str, Any]) -> Keys:
    try:
        keys = keys_of(jwks) if isinstance(jwks.get("keys"), list) else jwks
    except ValueError:
        raise Refused(503, "the issuer's keys cannot be used") from None
    if not keys:
        raise Refused(503, "the issuer publishes no usable key")
    return keys


def _proven(token: str, keys: Keys) -> tuple[TransferToken, str]:
    """The claims, once the signature has been found right, and the key's id."""
    if len(token) > MAX_TOKEN_LENGTH or _COMPACT.match(token) is None:
        raise unproven("the token is malformed", "malformed")
    header, payload, signature = token.split(".")
    meta = _object(header)
    algorithm, kid = meta.get("alg"), meta.get("kid")
    if algorithm not in ALGORITHMS or "crit" in meta or "b64" in meta or not isinstance(kid, str):
        raise unproven("the token's header is not acceptable", "malformed")
    key = keys.get(kid)
    if key is None:
        raise UnknownKey
    if key.algorithm_name != algorithm:
        raise unproven("the token's algorithm is not its key's", "signature")
    raw = _decoded(signature)
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != signature:
        raise unproven("the token is malformed", "malformed")
    if not key.Algorithm.verify(f"{header}.{payload}".encode(), key.key, raw):
        raise unproven("the token's signature is wrong", "signature")
    try:
        return from_claims(_object(payload)), kid
    except InvalidToken as error:
        raise unproven(f"the token's claims are not acceptable: {error}", "claims") from None


def _object(segment: str) -> dict[str, Any]:
    try:
        value = orjson.loads(_decoded(segment))
    except orjson.JSONDecodeError:
        raise unproven("the token is malformed", "malformed") from None
    if not isinstance(value, dict):
        raise unproven("the token is malformed", "malformed")
    return value


def _decoded(segment: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise unproven("the token is malformed", "malformed") from None
