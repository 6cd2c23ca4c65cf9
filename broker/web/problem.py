"""Errors as RFC 9457 problems, and what a problem type means."""

from __future__ import annotations

import inspect
import math
from typing import Any

import orjson

from broker.errors import BrokerError, MethodNotAllowed, NotFound, Unauthenticated, problem_types
from broker.log import scrub

CONTENT_TYPE = "application/problem+json"
REALM = "transfer-broker"

_REPEATING = ("detail", "field", "expected")
"""What of a problem may repeat words of the request."""


def render(error: BrokerError, token_given: bool = False) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers. RFC 6750 section 3 gives WWW-Authenticate, RFC 9110 section 10.2 Retry-After and Allow."""
    headers = {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = f'Bearer realm="{REALM}"' + (', error="invalid_token"' if token_given else "")
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(0, math.ceil(error.retry_after)))
    elif error.status in (429, 503):
        headers["Retry-After"] = "1"
    if isinstance(error, MethodNotAllowed) and error.expected is not None:
        headers["Allow"] = error.expected
    return error.status, orjson.dumps(_scrubbed(error.problem())), headers


def _scrubbed(body: dict[str, Any]) -> dict[str, Any]:
    """The problem without secrets that a request brought where none belong, such as a token for the name of a field (invariant 13)."""
    return body | {name: scrub(body[name]) for name in _REPEATING if name in body}


def describe(name: str) -> dict[str, Any]:
    """What a problem type means. Raises `NotFound`."""
    cls = problem_types().get(name)
    if cls is None:
        raise NotFound("No such problem type.")
    return {"type": f"/problems/{cls.type}", "status": cls.status, "title": cls.title, "description": inspect.getdoc(cls) or ""}
