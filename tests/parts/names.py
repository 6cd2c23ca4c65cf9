"""A name server (RFC 1035) to which every name is 127.0.0.1, for programs that ask one themselves, such as nginx."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

_HEADER = 12
_ADDRESS = bytes((127, 0, 0, 1))
_A = 1


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Its address and port, until the block ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=_serve, args=(line,), daemon=True)
        thread.start()
        host, port = line.getsockname()
        yield f"{host}:{port}"
        line.sendto(b"", (host, port))  # wakes it up for its end
        thread.join(10)


def _serve(line: socket.socket) -> None:
    while True:
        query, asker = line.recvfrom(512)
        if len(query) <= _HEADER:
            return
        end = query.index(0, _HEADER) + 5  # the name, its type and its class
        is_address = int.from_bytes(query[end - 4 : end - 2], "big") == _A
        head = query[:2] + b"\x81\x80\0\x01" + (b"\0\x01" if is_address else b"\0\0") + b"\0\0\0\0"
        answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + _ADDRESS if is_address else b""
        line.sendto(head + query[_HEADER:end] + answer, asker)
