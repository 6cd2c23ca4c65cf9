"""Which pages of other origins may read what the API answers (Fetch standard, section "CORS protocol").

Rules

- Nobody's, unless the operator names the origin: scheme, host and port, compared exactly; there is no wildcard and no ``null``.
- Credentials that a browser adds by itself are never allowed: a page brings its bearer token, and the status page's cookie is worth
  nothing to it.
- A preflight is answered for every path alike, before anything is looked up: it tells nothing of what is there.
- Answers differ by origin, and say so to caches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping

from multidict import istr

METHODS = "DELETE, GET, HEAD, PATCH, POST, PUT"
REQUEST_FIELDS = "Accept, Authorization, Content-Type, Idempotency-Key, If-Match, traceparent, X-Auth-Token, X-Client-Instance"
EXPOSED_FIELDS = "Digest, ETag, Link, Location, Repr-Digest, Retry-After, traceparent, WWW-Authenticate, X-Request-Id"
"""What a page may read of an answer beside the fields that every page may."""

MAX_AGE_SECONDS = 600

_ORIGIN, _ASKED_METHOD = istr("Origin"), istr("Access-Control-Request-Method")


class Cors:
    """The origins whose pages may use the API."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def preflight(self, method: str, incoming: Mapping[str, str]) -> dict[str, str] | None:
        """The answer's fields, when this is the question of a browser whether its page may go on; else ``None``."""
        origin = incoming.get(_ORIGIN)
        if method != "OPTIONS" or _ASKED_METHOD not in incoming or origin not in self._origins:
            return None
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": REQUEST_FIELDS,
            "Access-Control-Max-Age": str(MAX_AGE_SECONDS),
            "Vary": "Origin",
        }

    def allow(self, incoming: Mapping[str, str], fields: MutableMapping[str, str]) -> None:
        """Add to an answer's `fields` that the page may read it, if it may."""
        fields["Vary"] = f"{fields['Vary']}, Origin" if "Vary" in fields else "Origin"
        origin = incoming.get(_ORIGIN)
        if origin is not None and origin in self._origins:
            fields["Access-Control-Allow-Origin"] = origin
            fields["Access-Control-Expose-Headers"] = EXPOSED_FIELDS
