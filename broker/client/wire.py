"""One HTTP/1.1 connection to a store, used from a thread: reading and writing in large blocks without holding the interpreter's lock.

Rules: certificates are verified; redirects are an error, for only the broker says where bytes lie; `abort` from another
thread ends whatever is under way. Errors come as `StoreTrouble`, whose text holds no URL.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from broker.client import settings

CONNECT_SECONDS = 10.0
BLOCK = 1 << 20
"""Bytes read or written at a time."""


class Why(Enum):
    """What a store did wrong, as far as it decides what to do next."""

    REFUSED = "refused"
    """401 or 403: the URL is not good (any more)."""
    MISSING = "missing"
    """404 or 410."""
    BUSY = "busy"
    """429 or 503: later, perhaps."""
    BROKEN = "broken"
    """No connection, a cut one, or another 5xx."""
    STALLED = "stalled"
    """Silence."""
    WRONG = "wrong"
    """An answer that does not fit the request."""
    STOPPED = "stopped"
    """We ended it ourselves."""


@dataclass
class StoreTrouble(Exception):
    """A store did not do what its URL promised."""

    why: Why
    text: str
    retry_after: float = 0.0

    def __str__(self) -> str:
        return self.text


class Wire:
    """A connection that is opened when needed and kept for further requests to the same host. One thread at a time uses it."""

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.stopped = False
        self._connection: http.client.HTTPConnection | None = None
        self._origin: tuple[str, str] | None = None
        self._socket: socket.socket | None = None

    def open(self, url: str) -> tuple[http.client.HTTPConnection, str, bool]:
        """A connection to the URL's host, the request target, and whether the connection is a kept one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StoreTrouble(Why.WRONG, "the URL is no http(s) URL")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        origin = (parts.scheme, parts.netloc)
        self._require_running()
        if self._connection is not None and self._origin == origin:
            return self._connection, target, True
        self.close()
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=CONNECT_SECONDS, context=settings.trust())
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise StoreTrouble(Why.BROKEN, f"cannot connect: {describe(error)}") from None
        connection.sock.settimeout(self.stall_seconds)
        # http.client forgets its socket when the answer says that the connection ends with it; `interrupt` needs it still.
        self._connection, self._origin, self._socket = connection, origin, connection.sock
        self._require_running()
        return connection, target, False

    def _require_running(self) -> None:
        if self.stopped:
            self.close()
            raise StoreTrouble(Why.STOPPED, "stopped")

    def close(self) -> None:
        connection, self._connection, self._socket = self._connection, None, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """End what is under way, from another thread; the wire is of no use afterwards."""
        self.stopped = True
        self.interrupt()

    def interrupt(self) -> None:
        """Break the connection, so that a thread that waits for it wakes up."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def broken(self, error: Exception) -> StoreTrouble:
        """An error of the connection in our words. The connection is closed."""
        self.close()
        if self.stopped:
            return StoreTrouble(Why.STOPPED, "stopped")
        if isinstance(error, TimeoutError):
            return StoreTrouble(Why.STALLED, f"no byte for {self.stall_seconds:g} s")
        if isinstance(error, EOFError | http.client.RemoteDisconnected):
            return StoreTrouble(Why.BROKEN, "connection broken: it ended early")
        return StoreTrouble(Why.BROKEN, f"connection broken: {describe(error)}")


def describe(error: Exception) -> str:
    """An error of the network or a file in few words, without addresses or URLs."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return error.strerror
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    return type(error).__name__


def refusal(response: http.client.HTTPResponse) -> StoreTrouble:
    """An answer that is no success in our words."""
    status = response.status
    text = f"answered {status}"
    if status in (401, 403):
        return StoreTrouble(Why.REFUSED, text)
    if status in (404, 410):
        return StoreTrouble(Why.MISSING, text)
    if status in (429, 503):
        pause = response.headers.get("Retry-After", "")
        return StoreTrouble(Why.BUSY, text, float(pause) if pause.isdigit() else 0.0)
    if 300 <= status < 400:
        return StoreTrouble(Why.WRONG, f"{text}: redirects are not followed")
    return StoreTrouble(Why.BROKEN if status >= 500 else Why.WRONG, text)
