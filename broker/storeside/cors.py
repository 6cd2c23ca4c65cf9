"""Which pages of other origins a browser lets read what the file server answers (Fetch standard, section "CORS protocol").

Nobody's, unless the operator names the origin: scheme, host and port, compared exactly. A preflight needs no token, since browsers send
none with it, and is answered for every path alike; the request after it is verified as any other. No cookies are known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

METHODS = "DELETE, GET, HEAD, POST, PUT"
EXPOSED = "Accept-Ranges, Content-Range, ETag, Repr-Digest, Retry-After"
MAX_AGE_SECONDS = 600

_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?\Z")
_NAMES = re.compile(r"[A-Za-z0-9, _-]{0,1000}\Z")


def is_origin(text: str) -> bool:
    """Whether browsers could send this as an origin: ``http(s)://host[:port]``, in lower case."""
    return _ORIGIN.match(text) is not None


class Cors:
    """The origins whose pages may read."""

    def __init__(self, origins: Collection[str] = ()) -> None:
        self._origins = frozenset(origins)

    def fields(self, incoming: Mapping[str, str]) -> dict[str, str]:
        """What to add to an answer."""
        if not self._origins:
            return {}
        origin = incoming.get("Origin")
        if origin not in self._origins:
            return {"Vary": "Origin"}
        return {"Vary": "Origin", "Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED}

    def preflight(self, method: str, incoming: Mapping[str, str]) -> dict[str, str] | None:
        """The fields of the answer, when this is the question of a browser whether its page may go on; else ``None``.

        Which fields the page sends is its own affair: the token says what the request does.
        """
        asked = incoming.get("Access-Control-Request-Headers", "")
        if method != "OPTIONS" or "Access-Control-Request-Method" not in incoming or incoming.get("Origin") not in self._origins:
            return None
        return self.fields(incoming) | {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": asked if _NAMES.match(asked) else "",
            "Access-Control-Max-Age": str(MAX_AGE_SECONDS),
        }
