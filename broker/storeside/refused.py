"""The one way in which a request is refused: a status and a reason that is safe to show (no token, no key, no path)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

WHY = ("missing", "malformed", "key", "signature", "claims", "issuer", "audience", "early", "expired", "method", "path", "used", "busy")
"""What may be wrong with a token, in one word: the values of a metric's label."""


class Refused(Exception):
    """`status` is the HTTP status, `reason` a short text, `headers` go with the answer. `why` is one of `WHY`, when a token is at fault."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None, why: str | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.why = why
        self.headers = dict(headers or {})

    def problem(self) -> dict[str, str | int]:
        """As an RFC 9457 object; the type is the default, ``about:blank``."""
        return {"title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.reason}


def unproven(reason: str, why: str) -> Refused:
    """Of a request whose token proves nothing here and now (401)."""
    return Refused(401, reason, {"WWW-Authenticate": "Bearer"}, why)
