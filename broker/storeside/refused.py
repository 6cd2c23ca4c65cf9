"""The one way in which a request is refused: a status and a reason that is safe to show (no token, no key, no path)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus


class Refused(Exception):
    """`status` is the HTTP status, `reason` a short text, `headers` go with the answer."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})

    def problem(self) -> dict[str, str | int]:
        """As an RFC 9457 object; the type is the default, ``about:blank``."""
        return {"title": HTTPStatus(self.status).phrase, "status": self.status, "detail": self.reason}


def unproven(reason: str) -> Refused:
    """Of a request whose token proves nothing here and now (401)."""
    return Refused(401, reason, {"WWW-Authenticate": "Bearer"})
