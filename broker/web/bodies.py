"""How many bytes a broker holds of bodies that have not arrived whole.

Rules: each principal may have so many under way, and all together; who would send more is told to wait, and what it had sent is
dropped. Without this, whoever has a token could fill the memory by bodies that it never ends. A body that comes in one piece with its
head is counted by nobody.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from broker.errors import Unavailable

MEBIBYTE = 1 << 20
ALL_BYTES = 256 * MEBIBYTE
BYTES_OF_ONE = 32 * MEBIBYTE
"""Four of the largest bodies."""


class Share:
    """What one request holds."""

    __slots__ = ("_bodies", "_whose", "held")

    def __init__(self, bodies: Bodies, whose: Hashable) -> None:
        self._bodies = bodies
        self._whose = whose
        self.held = 0

    def take(self, count: int) -> None:
        """`count` bytes more have arrived. Raises `Unavailable` when they are too many."""
        self._bodies.take(self._whose, count)
        self.held += count


class Bodies:
    """The bodies under way at one broker."""

    def __init__(self, all_bytes: int = ALL_BYTES, bytes_of_one: int = BYTES_OF_ONE) -> None:
        self._all_bytes = all_bytes
        self._bytes_of_one = bytes_of_one
        self._of: dict[Hashable, int] = {}
        self.held = 0

    @contextmanager
    def arriving(self, whose: Hashable) -> Iterator[Share]:
        """Hold a body's bytes until the block ends."""
        share = Share(self, whose)
        try:
            yield share
        finally:
            self._give_back(whose, share.held)

    def take(self, whose: Hashable, count: int) -> None:
        own = self._of.get(whose, 0) + count
        if own > self._bytes_of_one or self.held + count > self._all_bytes:
            raise Unavailable("Too many large bodies are under way. Send them one after the other.", retry_after=1.0)
        self._of[whose] = own
        self.held += count

    def _give_back(self, whose: Hashable, count: int) -> None:
        if not count:
            return
        self.held -= count
        left = self._of[whose] - count
        if left:
            self._of[whose] = left
        else:
            del self._of[whose]
