"""Requests that wait for a slot, for all brokers to see. Whose turn it is, `broker.catalog.contention` decides.

Rules
- Rows are written by the broker at which the request waits, by one statement at a time; so no two statements wait for each other.
- They count while that broker is seen: it says so at least every half second while somebody waits. `sweep` removes what the dead left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.leases import Party
from broker.model import Direction

FORGOTTEN_SECONDS = 120.0
"""What a broker that was not seen for so long has left is removed. Nobody waits for longer than a minute."""


class Wait(NamedTuple):
    """A request that waits for a slot on any of these stores. Its id is its ticket's."""

    id: str
    party: Party
    direction: Direction
    store_ids: Sequence[int]
    bytes: int


_TEND = """
WITH seen AS (
    INSERT INTO desks (id, seen_at) VALUES ($1, clock_timestamp()) ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp()
), gone AS (
    DELETE FROM waits WHERE desk = $1 AND id = ANY ($2::uuid[])
)
INSERT INTO waits (id, desk, project, priority, weight, max_leases, max_bytes, direction, store_ids, bytes)
SELECT id, $1, project, priority, weight, max_leases, max_bytes, direction, string_to_array(store_ids, ',')::int[], bytes
FROM unnest($3::uuid[], $4::text[], $5::float8[], $6::float8[], $7::int[], $8::bigint[], $9::text[], $10::text[], $11::bigint[])
    AS w (id, project, priority, weight, max_leases, max_bytes, direction, store_ids, bytes)
ON CONFLICT (id) DO UPDATE SET desk = $1, store_ids = excluded.store_ids
"""


async def tend(db: Any, desk: UUID, come: Sequence[Wait], gone: Sequence[str]) -> None:
    """Say that this broker lives, and who has come and who has gone since the last time. A request that waits already keeps its place."""
    columns = [
        (wait.id, *wait.party, wait.direction.value, ",".join(map(str, wait.store_ids)), wait.bytes)
        for wait in {wait.id: wait for wait in come}.values()
    ]
    with reachable():
        await db.execute(_TEND, desk, list(gone), *(map(list, zip(*columns, strict=True)) if columns else [[]] * 9))


async def sweep(db: Any) -> None:
    """Remove what brokers left that were not seen for `FORGOTTEN_SECONDS`."""
    with reachable():
        await db.execute(
            """WITH dead AS (DELETE FROM desks WHERE id IN (
                    SELECT id FROM desks WHERE seen_at < clock_timestamp() - make_interval(secs => $1) ORDER BY id FOR UPDATE SKIP LOCKED
                ) RETURNING id)
                DELETE FROM waits WHERE id IN (
                    SELECT id FROM waits WHERE desk IN (SELECT id FROM dead) ORDER BY id FOR UPDATE SKIP LOCKED)""",
            FORGOTTEN_SECONDS,
        )
