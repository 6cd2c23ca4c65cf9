"""What transfers reported, kept as sums per (site, store, direction) that decay together (`broker.paths` says how).

They are added to with the reports (`broker.catalog.reports`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.catalog.connect import reachable
from broker.paths import Contribution, PathAverage


class PathKey(NamedTuple):
    """Which average: `site` may be a wider one, down to ``""`` for all clients."""

    site: str
    store_id: int
    direction: str


SUMS = Contribution._fields
"""The columns that decay together."""


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
