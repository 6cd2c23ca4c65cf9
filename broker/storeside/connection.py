"""The file server's connections: how many, how long they may be idle, and what is said to what is no HTTP.

At the limit a new connection takes the place of the one that has waited longest for its client to say something, so that nobody
keeps the server from others by sitting there; when all are at work, it is turned away. With TLS a connection counts from before its
handshake, which has as long as a head.

aiohttp closes a connection when no whole head has come for its keep-alive time, counted from the connection's begin or the
last answer; that is our limit on heads and on idleness alike. An answer that a client does not take in time ends the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from broker.storeside.application import SERVER, problem
from broker.storeside.counted import Counted
from broker.storeside.limits import Limits
from broker.storeside.receive import READ_BYTES
from broker.storeside.refused import Refused

MAX_LINE_BYTES = 8192 + 512
"""Of the request line: the longest target, and what is around it."""

MAX_FIELD_BYTES = 8190
MAX_FIELDS = 64
LINGER_SECONDS = 5.0
"""For which the rest of a refused body is read, so that the client can see the answer."""

_SETTLING_SECONDS = 1.0

_FULL = (
    f"HTTP/1.1 503 Service Unavailable\r\nServer: {SERVER}\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
).encode()


class Server(web.Server):
    """aiohttp's server within `limits`. What it refuses by itself repeats nothing of the request: it may hold a token."""

    def __init__(self, handler: Any, limits: Limits, counted: Counted, *, handshakes: bool = False) -> None:
        # No access log: its lines would hold tokens. Bodies are stored as they come, so a Content-Encoding is not undone.
        super().__init__(
            handler, access_log=None, read_bufsize=READ_BYTES, auto_decompress=False, keepalive_timeout=limits.head_seconds,
            lingering_time=LINGER_SECONDS, max_line_size=MAX_LINE_BYTES, max_field_size=MAX_FIELD_BYTES, max_headers=MAX_FIELDS,
        )  # fmt: skip
        self.limits = limits
        self.counted = counted
        self._handshakes = handshakes
        self._open: dict[_Connection, None] = {}  # those that were served last come last

    def enter(self, connection: _Connection) -> bool:
        """Count one more, if there is a place for it."""
        if len(self._open) >= self.limits.connections:
            idle = next((other for other in self._open if other.is_idle), None)
            if idle is None:
                self.counted.turned_away.inc()
                return False
            self.leave(idle)
            idle.make_room()
        self.served(connection)
        return True

    def __contains__(self, connection: object) -> bool:
        return connection in self._open

    def served(self, connection: _Connection) -> None:
        """It was at work until now."""
        self._open.pop(connection, None)
        self._open[connection] = None
        self.counted.connections.set(len(self._open))

    def leave(self, connection: _Connection) -> None:
        """It is gone; if it was counted, its place is free."""
        self._open.pop(connection, None)
        self.counted.connections.set(len(self._open))

    def __call__(self) -> web.RequestHandler:
        """A connection that was just accepted. Raises `TurnedAway` before a handshake that nobody has a place for."""
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        if self._handshakes:
            if not self.enter(connection):
                raise TurnedAway
            self._loop.call_later(self.limits.head_seconds + _SETTLING_SECONDS, connection.expect_made)
        return connection


class TurnedAway(Exception):
    """asyncio drops the socket then, and says nothing."""


class _Connection(web.RequestHandler):
    __slots__ = ("_made", "_server")

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._made = False

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request; one in its handshake cannot be told to go."""
        return self._made and self._waiter is not None and not self._messages

    def make_room(self) -> None:
        """Close at once: TLS would wait for the client's farewell."""
        transport = self.transport
        self.force_close()
        if isinstance(transport, asyncio.WriteTransport):
            transport.abort()

    def expect_made(self) -> None:
        """Of a handshake that failed nobody is told."""
        if not self._made:
            self._server.leave(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._made = True
        if self not in self._server and not self._server.enter(self):
            assert self.transport is not None
            self.transport.write(_FULL)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._server.leave(self)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        transport = self.transport
        try:
            async with asyncio.timeout(self._server.limits.slow_seconds):
                answered = await super().finish_response(request, resp, start_time)
                # aiohttp would go on to the next request, and keep what is not taken in memory.
                await self._drain_helper()
                if self in self._server:
                    self._server.served(self)
                return answered
        except ConnectionError:
            return resp, True
        except TimeoutError:
            self._server.counted.slow("out")
            if transport is not None:
                transport.abort()
            return resp, True

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        refused = Refused(500, "the store failed") if status == 500 else Refused(400, "this is no HTTP that can be read")
        self._server.counted.answered("other", refused.status)
        response = problem(refused)
        response.force_close()
        return response
