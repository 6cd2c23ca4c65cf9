"""Digests of a file: of the whole while it grows, and of its pieces.

hashlib releases the interpreter's lock, so a thread of its own hashes what other threads have just written; the bytes are
still in the page cache.
"""

from __future__ import annotations

import hashlib
import os
import threading

from broker.client.answers import Pieces
from broker.client.plan import Span
from broker.client.wire import BLOCK
from broker.model import Digests

PREFERENCE = ("sha256", "sha512", "md5", "sha1")
"""Which digest is checked when several are known: the fastest of those that prove content first."""


def chosen(digests: Digests) -> str | None:
    """The algorithm to check by; ``None`` when no digest is known."""
    return next((name for name in PREFERENCE if name in digests), None)


class GrowingDigest:
    """Hashes the first bytes of an open file as they become ready. `close` always; `finish` once all of them are."""

    def __init__(self, file: int, algorithm: str, size: int) -> None:
        self._file = file
        self._hash = hashlib.new(algorithm, usedforsecurity=False)
        self._size = size
        self._ready = 0
        self._closed = False
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def advance(self, ready: int) -> None:
        """The first `ready` bytes of the file will not change any more."""
        with self._changed:
            if ready > self._ready:
                self._ready = ready
                self._changed.notify()

    def finish(self) -> str:
        """The digest of the whole, in hex; waits for the rest. Raises `OSError` when the file cannot be read."""
        self.advance(self._size)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()

    def close(self) -> None:
        """Stop, wherever it is."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        position = 0
        try:
            while position < self._size:
                with self._changed:
                    while self._ready <= position and not self._closed:
                        self._changed.wait()
                    ready = self._ready
                if self._closed:
                    return
                while position < ready and not self._closed:
                    count = os.preadv(self._file, [buffer[: min(BLOCK, ready - position)]], position)
                    if count == 0:
                        raise OSError(5, "the file became shorter")
                    self._hash.update(buffer[:count])
                    position += count
        except OSError as error:
            self._error = error


def bad_pieces(file: int, size: int, pieces: Pieces) -> list[Span]:
    """The pieces of an open file whose digest differs."""
    bad = []
    buffer = memoryview(bytearray(BLOCK))
    for index, expected in enumerate(pieces.digests):
        start = index * pieces.length
        end = min(start + pieces.length, size)
        digest = hashlib.new(pieces.algorithm, usedforsecurity=False)
        position = start
        while position < end:
            count = os.preadv(file, [buffer[: min(BLOCK, end - position)]], position)
            if count == 0:
                break
            digest.update(buffer[:count])
            position += count
        if digest.hexdigest() != expected:
            bad.append(Span(start, end))
    return bad
