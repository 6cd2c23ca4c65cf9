"""Requests that came again: a client asks for the same blob while its ticket is open and unreported (`broker.signals`).

Rules
- A ticket costs a look-up in a dictionary here; everything else is done later, for those that came again (`broker.service.signals`).
- Only this broker's own tickets are compared: it is a hint. A client that asks all the time says no more than one that asks twice: one
  hint for each client and store in `PAUSE_SECONDS`.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

ASKED = 20_000
"""Requests that are remembered, at least; at most twice as many."""

PAUSE_SECONDS = 60.0
"""How long a client's further repetitions say nothing new of a store."""

WAITING = 1000
"""Hints that wait to be looked at; more are dropped."""


class Asked(NamedTuple):
    """A ticket that was given, and the store that came first."""

    ticket: str
    store: str


class Repeats:
    """Which client was given which ticket for which blob."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, str], tuple[Asked, float]] = {}
        self._before: dict[tuple[str, str], tuple[Asked, float]] = {}
        self._hinted: dict[tuple[str, str], float] = {}
        self._found: list[Asked] = []

    def note(self, client: str, blob: str, ticket: str, store: str, now: float, until: float = 0.0) -> None:
        """A ticket was given, whose transfer should be over long before `until`. `client` is `Client.name`."""
        key = client, blob
        before = self._asked.get(key)
        if before is None:
            before = self._before.get(key)
            if len(self._asked) >= ASKED:
                self._before, self._asked = self._asked, {}
        self._asked[key] = Asked(ticket, store), until
        if before is not None:
            self._came_again(client, before[0], now)

    def earlier(self, client: str, blob: str, now: float) -> str | None:
        """The store that came first in the client's ticket for this blob, as long as its transfer may last and nothing was said of it:
        who asks again so soon did not get it there."""
        key = client, blob
        known = self._asked.get(key) or self._before.get(key)
        return known[0].store if known is not None and now < known[1] else None

    def settled(self, client: str, blob: UUID) -> None:
        """The client has said how it went, or gave its ticket back."""
        self._asked.pop((client, str(blob)), None)
        self._before.pop((client, str(blob)), None)

    def take(self) -> list[Asked]:
        """The tickets that were not enough, since the last time."""
        found, self._found = self._found, []
        return found

    def _came_again(self, client: str, before: Asked, now: float) -> None:
        hint = client, before.store
        if now < self._hinted.get(hint, -PAUSE_SECONDS) + PAUSE_SECONDS or len(self._found) >= WAITING:
            return
        if len(self._hinted) >= ASKED:
            self._hinted.clear()
        self._hinted[hint] = now
        self._found.append(before)
