"""Stores whose slots adapt (`broker.adapt`): what they moved lately, and where their search stands.

One broker at a time, by an advisory lock that a transaction holds. Slots are changed outside of it, one row by a statement: no grant
waits for more than that, not even when this broker is stopped in the middle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.transaction import transaction
from broker.model import SlotRange

_LOCK = 0x6164_6170  # any number that no other advisory lock uses

LONGEST_SECONDS = 3600.0
"""Reports on tickets older than this are not counted: their ids bound what is read."""


class Window(NamedTuple):
    """One store and direction since it was last judged. `bytes` is what reports told meanwhile; `search` as `broker.adapt` keeps it."""

    store_id: int
    direction: str
    slots: int | None
    leased: int
    bounds: SlotRange
    search: Any
    seconds: float | None
    """``None``: for the first time."""
    bytes: int


@asynccontextmanager
async def alone(db: Any) -> AsyncIterator[Any]:
    """A connection while this broker is the one that adapts; ``None`` while another one is."""
    async with transaction(db) as connection:
        taken = await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK)
        yield connection if taken else None


async def windows(connection: Any, seconds: float, now: float) -> Sequence[Window]:
    """Those whose window has lasted for `seconds`. `now` is the clock by which ids of tickets are made."""
    oldest = UUID(int=int((now - LONGEST_SECONDS) * 1000) << 80)
    with reachable():
        rows = await connection.fetch(
            """WITH due AS MATERIALIZED (
                   SELECT * FROM slots WHERE adapt_max IS NOT NULL
                       AND (searched_at IS NULL OR searched_at <= clock_timestamp() - make_interval(secs => $1))
               ), moved AS MATERIALIZED (
                   SELECT d.store_id, d.direction, sum(r.bytes)::bigint AS bytes
                   FROM reports r JOIN tickets t ON t.id = r.ticket_id JOIN due d ON d.store_id = r.store_id AND r.at > d.searched_at
                       AND d.direction = CASE t.operation WHEN 'download' THEN 'read' ELSE 'write' END
                   WHERE r.ticket_id >= $2 AND t.id >= $2 AND r.outcome IN ('ok', 'slow') GROUP BY d.store_id, d.direction
               )
               SELECT d.store_id, d.direction, d.slots, d.leased, d.adapt_min, d.adapt_max, d.search,
                      extract(epoch FROM clock_timestamp() - d.searched_at)::float8, coalesce(m.bytes, 0)
               FROM due d LEFT JOIN moved m ON m.store_id = d.store_id AND m.direction = d.direction ORDER BY d.store_id, d.direction""",
            seconds, oldest,
        )  # fmt: skip
    return [Window(row[0], row[1], row[2], row[3], SlotRange(row[4], row[5]), row[6], row[7], row[8]) for row in rows]


_KEEP = """
UPDATE slots SET search = $4, searched_at = clock_timestamp()
WHERE store_id = $1 AND direction = $2 AND slots IS NOT DISTINCT FROM $3 AND (adapt_min, adapt_max) = ($5, $6)
"""

_MOVE = _KEEP.replace("SET search", "SET slots = $7, search")  # what names slots is told to every broker


async def write(db: Any, window: Window, slots: int, search: Any) -> None:
    """Begin the next window with so many slots, unless an administrator has changed something meanwhile."""
    values = (window.store_id, window.direction, window.slots, search, window.bounds.min, window.bounds.max)
    with reachable():
        if slots == window.slots:
            await db.execute(_KEEP, *values)
        else:
            await db.execute(_MOVE, *values, slots)
