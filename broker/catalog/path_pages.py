"""Pages of what was observed between sites and stores, for people to look at."""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.catalog.connect import reachable
from broker.paths import PathAverage


class PathRow(NamedTuple):
    """The average of one path, by names."""

    site: str
    store: str
    direction: str
    average: PathAverage


async def page(
    db: Any, *, private: bool, limit: int, after: tuple[str, str, str] = ("", "", ""), site: str | None = None, store: str | None = None
) -> list[PathRow]:
    """Up to `limit` paths by (site, store, direction), those after `after`. Stores of exposure ``service`` only with `private`."""
    with reachable():
        rows = await db.fetch(
            """SELECT p.site, s.name, p.direction, p.weight, p.good, p.bytes, p.busy_seconds, p.setup_weight, p.setup,
                      extract(epoch FROM p.updated_at)::float8
               FROM paths p JOIN stores s ON s.id = p.store_id
               WHERE (p.site, s.name, p.direction) > ($1, $2, $3) AND ($4 OR s.exposure = 'public')
                 AND ($5::text IS NULL OR p.site = $5) AND ($6::text IS NULL OR s.name = $6)
               ORDER BY p.site, s.name, p.direction LIMIT $7""",
            *after, private, site, store, limit,
        )  # fmt: skip
    return [PathRow(row[0], row[1], row[2], PathAverage(*list(row)[3:])) for row in rows]
