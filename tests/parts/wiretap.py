"""A listener on the line to a store: it passes everything on as it comes, and keeps what was sent to the store.

It knows no HTTP, so nothing escapes it: a token that reaches the store in whatever place is among the bytes that it keeps.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_PIECE = 1 << 16


@dataclass
class Wiretap:
    """Where it listens, what was `sent` to the store since the last `forget`, connection by connection, and how many bytes in all."""

    url: str
    sent: list[bytearray] = field(default_factory=list)
    received: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)
    is_away: bool = False
    """Whoever comes is hung up on."""

    def has(self, secret: str) -> bool:
        """Whether the store was sent `secret`."""
        return any(secret.encode() in stream for stream in self.sent)

    def has_field(self, name: str) -> bool:
        """Whether the store was sent a header field of that name."""
        return any(f"\r\n{name.lower()}:".encode() in bytes(stream).lower() for stream in self.sent)

    def count(self, size: int) -> None:
        """So many bytes more were sent."""
        with self._counting:
            self.received += size

    def forget(self) -> None:
        """Keep only what comes from now on."""
        for stream in self.sent:
            stream.clear()


@contextlib.contextmanager
def listening(store: str) -> Iterator[Wiretap]:
    """A tap before the store at the URL `store`, until the block ends."""
    target = urlsplit(store)
    address = (target.hostname or "", target.port or 80)
    with socket.create_server(("127.0.0.1", 0)) as server:
        tap = Wiretap(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread = threading.Thread(target=_accept, args=(server, address, tap), daemon=True)
        thread.start()
        yield tap
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _accept(server: socket.socket, address: tuple[str, int], tap: Wiretap) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return
        if tap.is_away:
            client.close()
            continue
        kept = bytearray()
        tap.sent.append(kept)
        store = socket.create_connection(address)
        threading.Thread(target=_pass, args=(client, store, kept, tap), daemon=True).start()
        threading.Thread(target=_pass, args=(store, client, None, tap), daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, kept: bytearray | None, tap: Wiretap) -> None:
    """Until the source has no more to say, or either of them is gone."""
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            if kept is not None:
                kept += piece
                tap.count(len(piece))
            target.sendall(piece)
    for end in (source, target):  # whoever hangs up hangs up for both: a cut must arrive as one
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    target.close()
