"""How much of the file server one client, or all of them, may hold, and how slow they may be.

* A request's head must be complete within `head_seconds` of the connection's begin, or of the answer before it; then the connection
  is closed. So an idle connection lasts as long.
* In every `slow_seconds` that are spent waiting for a client, `slow_bytes` must move, both for bodies that come (408) and for bytes
  that go (the connection is cut). Time in which the store's own disk is slow does not count for bodies that come.
* At most `connections` at once; one more takes the place of the one that has been idle longest, or is answered 503 and closed.
* At most `reads_per_token` requests at once with one token that reads, `writes_per_token` with one that writes (429). A token
  may be used from several connections, by ranges; for writes, a second one is a client's retry while the first still hangs. 0: no limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from broker.claims import TransferToken
from broker.storeside.refused import Refused


@dataclass(frozen=True, slots=True)
class Limits:
    """See the module's first lines. Seconds, and bytes."""

    head_seconds: float = 20.0
    slow_seconds: float = 30.0
    slow_bytes: int = 30_000
    connections: int = 1024
    reads_per_token: int = 64
    writes_per_token: int = 2


class PerToken:
    """Counts requests under way by their token's id."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._busy = Counter[str]()

    @contextlib.contextmanager
    def entered(self, token: TransferToken) -> Iterator[None]:
        """Hold a place while the block runs. Raises `Refused` (429)."""
        most = self._limits.reads_per_token if token.method == "GET" else self._limits.writes_per_token
        if most and self._busy[token.id] >= most:
            raise Refused(429, "too many requests at once with this token", {"Retry-After": "1"}, "busy")
        self._busy[token.id] += 1
        try:
            yield
        finally:
            self._busy[token.id] -= 1
            if not self._busy[token.id]:
                del self._busy[token.id]


class Waiting:
    """Whether a client that we wait for is too slow."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._spent = 0.0
        self._moved = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        began = self._loop.time()
        try:
            yield
        finally:
            self._spent += self._loop.time() - began

    @property
    def left(self) -> float:
        """Seconds until it is looked at again."""
        return max(0.0, self._limits.slow_seconds - self._spent)

    def too_slow(self, moved: int) -> bool:
        """Note that `moved` more bytes came; whether that is too few."""
        self._moved += moved
        if self._spent < self._limits.slow_seconds:
            return False
        slow = self._moved < self._limits.slow_bytes
        self._spent, self._moved = 0.0, 0
        return slow


_BYTES_ACKED = 120
"""Where tcpi_bytes_acked stands in struct tcp_info (linux/tcp.h, since 4.1)."""


def bytes_acked(transport: asyncio.BaseTransport) -> int:
    """How many bytes the other side of a TCP connection has taken since it began: what sendfile tells only at its end."""
    told = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    return int(struct.unpack_from("Q", told, _BYTES_ACKED)[0])
