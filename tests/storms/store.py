"""The real storeside, which writes down when each body begins and ends: ``python -m tests.storms.store`` takes its options.

Its sockets buffer little, so that a body is under way for as long as its client reads.

Lines of the file named by ``STORM_TRANSFERS``: ``SECONDS DIRECTION +1|-1``, the clock being the machine's, which is PostgreSQL's too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from broker.storeside import server
from broker.storeside.counted import Counted

VARIABLE = "STORM_TRANSFERS"


class Event(NamedTuple):
    """A body at a store began (1) or ended (-1)."""

    at: float
    direction: str
    change: int


def events(file: Path) -> list[Event]:
    """What a store has written down; `direction` as leases have it."""
    lines = (line.split() for line in file.read_text().splitlines())
    return [Event(float(at), {"out": "read", "in": "write"}[direction], int(change)) for at, direction, change in lines]


class _Tracked:
    def __init__(self, gauge: Any, file: int, direction: str) -> None:
        self._gauge, self._file, self._direction = gauge, file, direction

    @contextlib.contextmanager
    def track_inprogress(self) -> Iterator[None]:
        with self._gauge.track_inprogress():
            self._write("+1")
            try:
                yield
            finally:
                self._write("-1")

    def _write(self, change: str) -> None:
        os.write(self._file, f"{time.time():.6f} {self._direction} {change}\n".encode())


class _Written(Counted):
    _file = os.open(os.environ.get(VARIABLE, os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def under_way(self, direction: str) -> Any:
        return _Tracked(super().under_way(direction), self._file, direction)


class _Small(socket.socket):
    def listen(self, *arguments: Any) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)  # what it accepts has the same
        super().listen(*arguments)


if __name__ == "__main__":
    socket.socket = _Small  # type: ignore[misc]
    server.Counted = _Written  # type: ignore[misc]
    server.main()
