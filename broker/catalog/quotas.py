"""What administrators allow single projects, and what projects with limits hold.

A change reaches every broker by the change log, within seconds. Leases that were granted before a project had a limit are not
counted against it; they end by themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.catalog.connect import reachable


class Quota(NamedTuple):
    """``None``: as the configuration says. `leases` and `bytes` are what the project holds now, where that is counted."""

    project: str
    max_leases: int | None = None
    max_bytes: int | None = None
    weight: float | None = None
    leases: int = 0
    bytes: int = 0


_SELECT = """
SELECT q.project, q.max_leases, q.max_bytes, q.weight, coalesce(u.leases, 0), coalesce(u.bytes, 0)
FROM quotas q LEFT JOIN usage u ON u.project = q.project
"""


async def load(db: Any) -> list[Quota]:
    """Every project that has a quota of its own."""
    with reachable():
        return [Quota(*row) for row in await db.fetch(_SELECT)]


async def page(db: Any, *, limit: int, after: str = "") -> list[Quota]:
    """Up to `limit` of them by project, those after `after`."""
    with reachable():
        return [Quota(*row) for row in await db.fetch(_SELECT + "WHERE q.project > $1 ORDER BY q.project LIMIT $2", after, limit)]


async def get(db: Any, project: str) -> Quota | None:
    """The quota of a project; ``None`` when it has none of its own."""
    with reachable():
        row = await db.fetchrow(_SELECT + "WHERE q.project = $1", project)
    return None if row is None else Quota(*row)


async def put(db: Any, quota: Quota) -> None:
    """Set a project's quota as a whole."""
    with reachable():
        await db.execute(
            """INSERT INTO quotas (project, max_leases, max_bytes, weight) VALUES ($1, $2, $3, $4)
               ON CONFLICT (project) DO UPDATE SET max_leases = $2, max_bytes = $3, weight = $4""",
            quota.project, quota.max_leases, quota.max_bytes, quota.weight,
        )  # fmt: skip


async def delete(db: Any, project: str) -> bool:
    """Let the configuration hold for a project again. False when nothing else did."""
    with reachable():
        return await db.fetchval("DELETE FROM quotas WHERE project = $1 RETURNING true", project) is not None


class Held(NamedTuple):
    """A counted lease of a project: how long it has lasted, how long it was expected to, and its bytes."""

    held_seconds: float
    expected_seconds: float
    bytes: int


async def held(db: Any, project: str, most: int = 1000) -> list[Held]:
    """The counted leases of a project, as far as there are not more than `most`."""
    with reachable():
        rows = await db.fetch(
            """SELECT extract(epoch FROM clock_timestamp() - granted_at)::float8,
                      extract(epoch FROM coalesce(expected_at, expires_at) - granted_at)::float8, bytes
               FROM leases WHERE project = $1 AND counted LIMIT $2""",
            project, most,
        )  # fmt: skip
    return [Held(*row) for row in rows]
