"""What transfers reported, kept as sums per (site, store, direction) that decay together (`broker.paths` says how)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.paths import Contribution, PathAverage


class PathKey(NamedTuple):
    """Which average: `site` may be a wider one, down to ``""`` for all clients."""

    site: str
    store_id: int
    direction: str


class ReportRow(NamedTuple):
    """A client's word on one place of its ticket, and what it adds to which averages."""

    ticket_id: UUID
    store_id: int
    outcome: str
    bytes: int
    seconds: float
    detail: str | None
    contributions: Mapping[PathKey, Contribution]


_REPORT = """
INSERT INTO reports (ticket_id, store_id, outcome, bytes, seconds, detail)
SELECT DISTINCT ON (ticket_id, store_id) * FROM unnest($1::uuid[], $2::int[], $3::text[], $4::bigint[], $5::float8[], $6::text[])
    AS r (ticket_id, store_id, outcome, bytes, seconds, detail)
ON CONFLICT DO NOTHING RETURNING ticket_id, store_id
"""

_SUMS = ("weight", "good", "bytes", "busy_seconds", "setup_weight", "setup")
_KEPT = "power(2.0, -greatest(0, extract(epoch FROM excluded.updated_at - p.updated_at)::float8) / $10)"

_ADD = f"""
INSERT INTO paths AS p (site, store_id, direction, {", ".join(_SUMS)}, updated_at)
SELECT *, now() FROM unnest($1::text[], $2::int[], $3::text[], {", ".join(f"${n}::float8[]" for n in range(4, 10))})
    AS a (site, store_id, direction, {", ".join(_SUMS)})
ORDER BY site, store_id, direction
ON CONFLICT (site, store_id, direction) DO UPDATE SET
    {", ".join(f"{name} = p.{name} * {_KEPT} + excluded.{name}" for name in _SUMS)},
    updated_at = greatest(p.updated_at, excluded.updated_at)
"""  # noqa: S608 - only the names above


async def report(connection: Any, rows: Sequence[ReportRow], half_life_seconds: float) -> list[bool]:
    """Record reports and add them to the averages, in one transaction. ``False`` for each that was recorded before: it counts once."""
    async with connection.transaction():
        recorded = await connection.fetch(_REPORT, *(list(column) for column in zip(*(row[:6] for row in rows), strict=True)))
        new = {(ticket_id, store_id) for ticket_id, store_id in recorded}
        sums: dict[PathKey, list[float]] = {}
        fresh = []
        for row in rows:
            first = (row.ticket_id, row.store_id) in new
            new.discard((row.ticket_id, row.store_id))  # the same report twice in one batch
            fresh.append(first)
            if first:
                for key, added in row.contributions.items():
                    total = sums.setdefault(key, [0.0] * 6)
                    for i, value in enumerate(added):
                        total[i] += value
        if sums:
            columns = zip(*((*key, *total) for key, total in sums.items()), strict=True)
            await connection.execute(_ADD, *(list(column) for column in columns), half_life_seconds)
    return fresh


async def since(db: Any, instant: float) -> dict[PathKey, PathAverage]:
    """The averages that changed at or after `instant` (the database's clock, as in `PathAverage.updated_at`); all with 0."""
    with reachable():
        rows = await db.fetch(
            """SELECT site, store_id, direction, weight, good, bytes, busy_seconds, setup_weight, setup,
                      extract(epoch FROM updated_at)::float8
               FROM paths WHERE updated_at >= to_timestamp($1)""",
            instant,
        )
    return {PathKey(*list(row)[:3]): PathAverage(*list(row)[3:]) for row in rows}
