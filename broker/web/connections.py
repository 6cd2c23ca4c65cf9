"""What one connection may take of the broker before there is a request that can be answered: time, bytes, and a place.

Rules

- A request's head has to be complete `head_seconds` after its first byte (of a new connection: after it was accepted), and is given
  up when it is not after `head_bytes`; a client that does not read its answer has `answer_seconds`.
- So many connections are kept open in all and of one client's address (an IPv6 one by its /64; trusted proxies are not
  counted by address). One more of an address gets 503 and is closed. One more in all takes the place of the one that has waited longest
  for a request, so that nobody keeps the broker from others by sitting there from many addresses; when none waits, it gets 503.
- A request that comes in one piece costs a comparison here and no timer.

What is refused here never became a request: it gets a problem as its answer and is counted by reason.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from broker import errors
from broker.metrics import Metrics
from broker.web import problem, reply
from broker.web.refusals import network_of

FILES_APART = 256
"""File descriptors that are left for the database, stores and files."""

LINGER_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of the connections of one broker."""

    connections: int = 8192
    connections_per_address: int = 1024
    head_seconds: float = 15.0
    head_bytes: int = 32 << 10
    head_fields: int = 100
    idle_seconds: float = 75.0
    answer_seconds: float = 60.0


class Gate:
    """Counts the connections that are open."""

    def __init__(self, bounds: Bounds, metrics: Metrics, is_trusted: Callable[[str], bool]) -> None:
        self.bounds = bounds
        self.metrics = metrics
        self._is_trusted = is_trusted
        self._open: dict[Connection, None] = {}  # that which has begun a request last comes last
        self._by_network: dict[str, int] = {}

    def enter(self, connection: Connection, address: str) -> bool:
        """Count one more, if there is a place for it."""
        network = None if self._is_trusted(address) else network_of(address)
        if network is not None and self._by_network.get(network, 0) >= self.bounds.connections_per_address:
            self.metrics.http_refusals.inc("connections-of-address")
            return False
        if len(self._open) >= self.bounds.connections and not self._make_room():
            self.metrics.http_refusals.inc("connections")
            return False
        if network is not None:
            self._by_network[network] = self._by_network.get(network, 0) + 1
        self._open[connection] = None
        self.metrics.http_connections.set(len(self._open))
        return True

    def _make_room(self) -> bool:
        idle = next((connection for connection in self._open if connection.is_idle), None)
        if idle is None:
            return False
        self.metrics.http_refusals.inc("made-room")
        idle.make_room()
        return True

    def begun(self, connection: Connection) -> None:
        """It brought a request."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def leave(self, connection: Connection, address: str) -> None:
        """One that had entered is gone."""
        del self._open[connection]
        self.metrics.http_connections.set(len(self._open))
        if not self._is_trusted(address):
            network = network_of(address)
            count = self._by_network.get(network, 0) - 1
            if count > 0:
                self._by_network[network] = count
            else:
                self._by_network.pop(network, None)


class Connection(RequestHandler):
    """aiohttp's connection, within bounds."""

    __slots__ = ("_address", "_deadline", "_entered", "_gate", "_head_bytes", "_unread")

    def __init__(self, server: web.Server, gate: Gate, **options: Any) -> None:
        super().__init__(server, keepalive_timeout=gate.bounds.idle_seconds, max_headers=gate.bounds.head_fields, **options)
        self._gate = gate
        self._address = ""
        self._entered = False
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) else ""
        self._entered = self._gate.enter(self, self._address)
        if not self._entered:
            self._force_close = True
            cast(asyncio.Transport, transport).write(spelled(errors.TooManyConnections(retry_after=1.0)))
            transport.close()
            return
        super().connection_made(transport)
        self._await_head()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request."""
        return self._waiter is not None and not self._messages

    def make_room(self) -> None:
        """Close at once: TLS would wait for the client's farewell."""
        transport = self.transport
        self._leave()
        self.force_close()
        if transport is not None:
            transport.abort()

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._gate.leave(self, self._address)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._leave()
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._gate.begun(self)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is not None or (self._waiter is not None and not self._waiter.done()):
            if self._deadline is None:
                self._await_head()
            self._head_bytes += len(data)
            if self._head_bytes > self._gate.bounds.head_bytes:
                self._give_up("head-size", errors.HeadTooLarge())

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._deadline = self._loop.call_later(self._gate.bounds.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        # A connection that never said anything is closed without a word, as an idle one is.
        self._give_up("head-late", errors.HeadTimeout() if self._head_bytes else None)

    def _give_up(self, reason: str, error: errors.BrokerError | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.transport is None:
            return
        self._gate.metrics.http_refusals.inc(reason)
        transport = self.transport
        if error is None or not transport.can_write_eof():
            self.force_close()
            return
        # Closed at once, with more of the client's bytes on their way, the connection would be reset before the answer is read.
        self._force_close = True
        if self._waiter is not None:
            self._waiter.cancel()
        transport.write(spelled(error))
        transport.write_eof()
        self._unread = self._loop.call_later(LINGER_SECONDS, transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None and self.transport is not None:
            self._unread = self._loop.call_later(self._gate.bounds.answer_seconds, self._abort, self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def force_close(self) -> None:
        transport = self.transport
        super().force_close()
        if transport is not None and self._unread is None and transport.get_write_buffer_size():
            self._unread = self._loop.call_later(self._gate.bounds.answer_seconds, self._abort, transport)

    def _abort(self, transport: asyncio.Transport) -> None:
        self._gate.metrics.http_refusals.inc("answer-unread")
        transport.abort()


def spelled(error: errors.BrokerError) -> bytes:
    """A problem as the whole answer of a connection that ends with it."""
    status, body, fields = problem.render(error)
    return reply.head(status, fields, body, False, False) + body


def allow_files(wanted: int) -> int:
    """Let this process open files for so many connections, as far as it may: how many connections it has files for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FILES_APART
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, soft - FILES_APART))
    if possible < wanted:
        _log.warning("too few open files are allowed for http.max_connections", connections=possible, run=f"ulimit -n {needed}")
    return possible
