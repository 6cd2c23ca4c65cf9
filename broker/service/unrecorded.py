"""The latest stale tickets of this broker (`broker.service.stale`), so that what is asked of them is refused for what it is."""

from __future__ import annotations

from collections import OrderedDict
from uuid import UUID

KEPT = 10_000
"""Tickets whose ids are remembered, at most."""


class Unrecorded:
    """Ids of tickets that no table has."""

    def __init__(self) -> None:
        self._ids: OrderedDict[UUID, None] = OrderedDict()

    def note(self, id: UUID) -> None:
        """This one has been given."""
        self._ids[id] = None
        while len(self._ids) > KEPT:
            self._ids.popitem(last=False)

    def __contains__(self, id: UUID) -> bool:
        return id in self._ids
