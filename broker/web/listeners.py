"""Listeners: on an address, on a Unix socket, or on sockets that were bound before, each for as long as a block lasts.

When the block ends, nobody is accepted any more, and requests under way have `STOP_SECONDS` to end.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from broker.config import Address
from broker.web.tls import HANDSHAKE_SECONDS, Certificate

STOP_SECONDS = 5.0


@asynccontextmanager
async def listening(
    server: web.Server,
    address: Address | Path | None,
    *,
    bound: Sequence[socket.socket] = (),
    reuse_port: bool = False,
    certificate: Certificate | None = None,
) -> AsyncIterator[Address | None]:
    """`server` listens on `address`, if any, or on the sockets `bound` instead; where that is (of a Unix socket: ``None``).

    Raises `OSError` that names the address.
    """
    if address is None:
        yield None
        return
    make: Any = server  # it makes protocols, which the annotations do not say
    loop = asyncio.get_running_loop()
    how: dict[str, Any] = {"backlog": 1024}
    if certificate is not None:
        how |= {"ssl": certificate.context, "ssl_handshake_timeout": HANDSHAKE_SECONDS}
    if isinstance(address, Path):
        address.unlink(missing_ok=True)  # of the worker before
        listeners = [await loop.create_unix_server(make, address)]
    elif bound:
        listeners = [await loop.create_server(make, sock=listener, **how) for listener in bound]
    else:
        try:
            listeners = [await loop.create_server(make, address.host, address.port, reuse_port=reuse_port or None, **how)]
        except OSError as error:
            trouble = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # its text has the address again
            hint = "; http.listen and http.metrics_listen choose others" if error.errno == errno.EADDRINUSE else ""
            raise OSError(error.errno, f"cannot listen on {address}: {trouble}{hint}") from None
    try:
        yield None if isinstance(address, Path) else Address(address.host, listeners[0].sockets[0].getsockname()[1])
    finally:
        for listener in listeners:
            listener.close()
        server.pre_shutdown()
        await server.shutdown(STOP_SECONDS)
