"""The transfer token: what a JWT for a store says, and how its claims are read.

One token allows one method on one path of one store until one instant (invariant 8). Reading is strict: every claim has
its type and bounds, and an unknown one is refused, so that a verifier never ignores a restriction that it does not know.
schemas/claims.json describes the same for implementers in other languages; a test holds both together.

======  ===========================================================================================================
claim   meaning
======  ===========================================================================================================
iss     who issued it: the broker's URL
aud     the one store that it is for (a string, no list)
sub     for whom; names no person when the token is shared
exp     end, POSIX seconds
nbf     begin, POSIX seconds
jti     its id
mth     ``GET`` (covers HEAD), ``PUT``, ``POST`` (finishes a multipart upload) or ``DELETE``
path    the absolute path as the store sees it: percent-decoded, without query
len     PUT: the body's length in bytes. POST: the finished object's
dig     PUT: the body's digest, ``sha256:HEX`` or ``md5:HEX``. POST: the finished object's
upl     the multipart upload that is meant, not the object: PUT a part, GET lists parts, POST finishes, DELETE aborts
off     PUT with upl: where the part begins, in bytes of the whole object
======  ===========================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from broker.model import MAX_BLOB_SIZE

ALGORITHMS = ("ES256", "RS256", "EdDSA")
"""What a verifier may accept. Nothing symmetric: a verifier holds no secret."""

LEEWAY_SECONDS = 5
"""How far a verifier's clock may be behind: `nbf` is stretched by this much, once, at the verifier. `exp` is exact (invariant 8)."""

MAX_TOKEN_LENGTH = 4096
"""Longer tokens are refused unread (characters)."""

METHODS = ("GET", "PUT", "POST", "DELETE")
MAX_PATH_LENGTH = 1024
MAX_NAME_LENGTH = 255
MAX_INSTANT = 1 << 40

_DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})\Z")
_UPLOAD = re.compile(r"[A-Za-z0-9_-]{1,200}\Z")
_PATH = re.compile(r"/[^\x00-\x1f\x7f]*\Z")
_NAME = re.compile(r"[^\x00-\x1f\x7f]+\Z")

_REQUIRED = frozenset(("iss", "aud", "sub", "exp", "nbf", "jti", "mth", "path"))
_KNOWN = _REQUIRED | {"len", "dig", "upl", "off"}


class InvalidToken(Exception):
    """The claims are no transfer token. The text is safe to show: it names the claim, never its value."""


@dataclass(frozen=True, slots=True)
class TransferToken:
    """The claims of one transfer token; the module's docstring says what each means. `digest` is ``sha256:HEX`` or ``md5:HEX``."""

    issuer: str
    audience: str
    subject: str
    method: str
    path: str
    expires_at: float
    not_before: float
    id: str
    length: int | None = None
    digest: str | None = None
    upload: str | None = None
    offset: int | None = None

    def to_claims(self) -> dict[str, Any]:
        """As JWT claims. Instants are rounded down to whole seconds, so that a token ends no later than promised."""
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": self.audience,
            "sub": self.subject,
            "exp": int(self.expires_at),
            "nbf": int(self.not_before),
            "jti": self.id,
            "mth": self.method,
            "path": self.path,
        }
        if self.length is not None:
            claims["len"] = self.length
        if self.digest is not None:
            claims["dig"] = self.digest
        if self.upload is not None:
            claims["upl"] = self.upload
        if self.offset is not None:
            claims["off"] = self.offset
        return claims


def from_claims(claims: Mapping[str, Any]) -> TransferToken:
    """Read JWT claims strictly. Raises `InvalidToken` for anything that schemas/claims.json does not allow."""
    if not claims.keys() >= _REQUIRED:
        raise InvalidToken(f"claim missing: {min(_REQUIRED - claims.keys())}")
    if not claims.keys() <= _KNOWN:
        raise InvalidToken("unknown claim")
    method = claims["mth"]
    if not isinstance(method, str) or method not in METHODS:
        raise InvalidToken("mth must be GET, PUT, POST or DELETE")
    token = TransferToken(
        issuer=_text(claims, "iss", _NAME, MAX_NAME_LENGTH),
        audience=_text(claims, "aud", _NAME, MAX_NAME_LENGTH),
        subject=_text(claims, "sub", _NAME, MAX_NAME_LENGTH),
        method=method,
        path=_text(claims, "path", _PATH, MAX_PATH_LENGTH),
        expires_at=_instant(claims, "exp"),
        not_before=_instant(claims, "nbf"),
        id=_text(claims, "jti", _NAME, MAX_NAME_LENGTH),
        length=_count(claims, "len") if "len" in claims else None,
        digest=_text(claims, "dig", _DIGEST, MAX_NAME_LENGTH) if "dig" in claims else None,
        upload=_text(claims, "upl", _UPLOAD, MAX_NAME_LENGTH) if "upl" in claims else None,
        offset=_count(claims, "off") if "off" in claims else None,
    )
    _check_method(token)
    return token


def _check_method(token: TransferToken) -> None:
    """Each method has its own claims: what it would not look at must not be there."""
    if token.method in ("GET", "DELETE") and (token.length is not None or token.digest is not None):
        raise InvalidToken("len and dig belong to PUT and POST")
    if token.method == "POST" and token.upload is None:
        raise InvalidToken("POST needs upl")
    if token.offset is not None and (token.method != "PUT" or token.upload is None):
        raise InvalidToken("off belongs to PUT with upl")
    if token.method == "PUT" and token.upload is not None and (token.offset is None or token.length is None):
        raise InvalidToken("a part needs off and len")


def _text(claims: Mapping[str, Any], name: str, form: re.Pattern[str], longest: int) -> str:
    value = claims[name]
    if not isinstance(value, str) or len(value) > longest or form.match(value) is None:
        raise InvalidToken(f"{name} is malformed")
    return value


def _instant(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or not 0 <= value <= MAX_INSTANT:
        raise InvalidToken(f"{name} is no instant")
    return float(value)


def _count(claims: Mapping[str, Any], name: str) -> int:
    """A whole number of bytes. ``5.0`` is one in JSON Schema, so it is one here."""
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_BLOB_SIZE or value != int(value):
        raise InvalidToken(f"{name} is no number of bytes")
    return int(value)
