"""Errors as git-lfs shows them: a message, and for 401 how to prove who one is (docs/api/batch.md, "Response Errors").

What passes by itself is a 429, also where the catalogue or a store is away: git-lfs 3.3 takes a 503 for final, and asks eight times again
after a 429. Who asks again whether an object has arrived (``verify``) asks for a place for it first, and may be sent elsewhere.
"""

from __future__ import annotations

import math

import orjson

from broker.errors import (
    BrokerError,
    Busy,
    Invalid,
    MethodNotAllowed,
    NoDestination,
    QuotaExceeded,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
)
from broker.log import scrub
from broker.web.problem import REALM

MEDIA_TYPE = "application/vnd.git-lfs+json"

AWAY_SECONDS = 3
"""Between two requests while something is away, at least: eight of them are to outlast a restart."""

_AWAY = (StoreUnavailable, Unavailable)
_WAIT = 429
_NO_ROOM = 507
_INVALID = 422
_UNTIL = 4096


def status(error: BrokerError) -> int:
    """The status of an error, of a request or of one object."""
    if isinstance(error, Invalid):
        return _INVALID
    if isinstance(error, _AWAY):
        return _WAIT
    if isinstance(error, NoDestination):
        reasons = {entry["reason"] for entry in error.extra.get("excluded", ())}
        return _NO_ROOM if reasons == {"no-capacity"} else error.status
    return error.status


def message(error: BrokerError) -> str:
    """An error in words: what is wrong, which field, what was expected there, and why each store is left out."""
    text = scrub(error.detail or error.title)
    if error.field is not None:
        expected = "" if error.expected is None else f", expected: {scrub(error.expected)}"
        text += f" ({scrub(error.field)}{expected})"
    elif error.expected is not None:
        text += f" (expected: {scrub(error.expected)})"
    excluded = error.extra.get("excluded", ())
    if excluded:
        text += " (" + ", ".join(f"{entry['store']}: {entry['reason']}" for entry in excluded) + ")"
    if isinstance(error, Busy | QuotaExceeded) and error.retry_after is not None:
        text += f" Come again in {math.ceil(error.retry_after)} s."
    return text[:_UNTIL]


def render(error: BrokerError, token_given: bool) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and header fields. Whether a token was given makes no difference: git-lfs asks for a password either way."""
    headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
    if isinstance(error, Unauthenticated):
        headers["LFS-Authenticate"] = headers["WWW-Authenticate"] = f'Basic realm="{REALM}"'
    code = status(error)
    if isinstance(error, _AWAY):
        headers["Retry-After"] = str(max(AWAY_SECONDS, math.ceil(error.retry_after or 0)))
    elif error.retry_after is not None:
        headers["Retry-After"] = str(max(0, math.ceil(error.retry_after)))
    elif code in (429, 503):
        headers["Retry-After"] = "1"
    if isinstance(error, MethodNotAllowed) and error.expected is not None:
        headers["Allow"] = error.expected
    return code, orjson.dumps({"message": message(error)}), headers
