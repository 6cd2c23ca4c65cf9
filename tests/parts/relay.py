"""A store that dies in the middle: passes bytes between its clients and the store behind it, until so many have come from there.

Then it lets go of all connections at once and takes no more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class Relay:
    """Passes bytes to `port` of 127.0.0.1 from `url`; dies when `left` more bytes have come back (None: does not)."""

    port: int
    url: str = ""
    left: int | None = None
    passed: int = 0
    """Bytes that came from the store."""
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        store, to_store = await asyncio.open_connection("127.0.0.1", self.port)
        self._open |= {to_client, to_store}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pass(client, to_store, counted=False), self._pass(store, to_client, counted=True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        while data := await reader.read(1 << 16):
            if counted:
                self.passed += len(data)
                if self.left is not None and (left := self.left - len(data)) < 0:
                    self.die()
                    return
                self.left = None if self.left is None else left
            writer.write(data)
            await writer.drain()
        writer.close()

    def die(self) -> None:
        """Take no more connections, and let go of those that there are."""
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def relayed(port: int) -> AsyncIterator[Relay]:
    """A relay to `port` of 127.0.0.1."""
    relay = Relay(port)
    relay._server = await asyncio.start_server(relay._connected, "127.0.0.1", 0)
    relay.url = f"http://127.0.0.1:{relay._server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        relay.die()
