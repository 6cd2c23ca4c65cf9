"""How many there are of each thing, and how full and how fast the stores are: what the catalogue says for metrics.

`states`, `deletions` and `size` scan tables: to be asked once a minute, not more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.catalog.connect import reachable
from broker.catalog.images import STATUS


class StateCount(NamedTuple):
    """`subject` is ``uploads``, ``copies``, ``replicas`` or ``images``."""

    subject: str
    state: str
    number: int


class StoreCount(NamedTuple):
    """Leases held on a store in one direction, how many it allows, and its bandwidth; ``None`` where it has no such limit."""

    store: str
    direction: str
    leased: int
    slots: int | None
    bandwidth: int | None


class SpaceCount(NamedTuple):
    """Bytes taken on a store; `capacity` is ``None`` where it is unlimited."""

    store: str
    taken: int
    capacity: int | None


class PathCount(NamedTuple):
    """What sites see of a store lately: how many there are, bytes per second and share of success of the worst, median and best."""

    store: str
    direction: str
    sites: int
    rates: Sequence[float] | None
    successes: Sequence[float]


async def states(db: Any) -> list[StateCount]:
    """Uploads, copies and replicas by state, images by status."""
    with reachable():
        rows = await db.fetch(
            f"""SELECT 'uploads', state, count(*) FROM uploads GROUP BY state
                UNION ALL SELECT 'copies', state, count(*) FROM copies GROUP BY state
                UNION ALL SELECT 'replicas', state, count(*) FROM replicas GROUP BY state
                UNION ALL SELECT 'images', {STATUS} AS shown, count(*) FROM images i GROUP BY shown"""  # noqa: S608 - no value of a request
        )
    return [StateCount(*row) for row in rows]


async def stores(db: Any) -> list[StoreCount]:
    """Every store by direction."""
    with reachable():
        rows = await db.fetch(
            """SELECT t.name, s.direction, s.leased, s.slots, CASE s.direction WHEN 'read' THEN t.read_bandwidth ELSE t.write_bandwidth END
               FROM slots s JOIN stores t ON t.id = s.store_id ORDER BY t.name, s.direction"""
        )
    return [StoreCount(*row) for row in rows]


async def spaces(db: Any) -> list[SpaceCount]:
    """Every store."""
    with reachable():
        rows = await db.fetch("SELECT t.name, p.taken, p.capacity FROM spaces p JOIN stores t ON t.id = p.store_id ORDER BY t.name")
    return [SpaceCount(*row) for row in rows]


async def project_leases(db: Any, most: int) -> dict[str, int]:
    """Unexpired leases of the `most` projects that hold most; those of all others under the name ``""``."""
    with reachable():
        rows = await db.fetch(
            """SELECT CASE WHEN place <= $1 THEN project ELSE '' END AS name, sum(held)::int FROM (
                   SELECT t.project, count(*) AS held, row_number() OVER (ORDER BY count(*) DESC, t.project) AS place
                   FROM leases l JOIN tickets t ON t.id = l.ticket_id WHERE l.expires_at > clock_timestamp() GROUP BY t.project
               ) ranked GROUP BY name""",
            most,
        )
    return dict(map(tuple, rows))


async def project_waits(db: Any, most: int) -> dict[str, int]:
    """Requests that wait for slots, of the `most` projects with most of them; those of all others under the name ``""``."""
    with reachable():
        rows = await db.fetch(
            """SELECT CASE WHEN place <= $1 THEN project ELSE '' END AS name, sum(waiting)::int FROM (
                   SELECT w.project, count(*) AS waiting, row_number() OVER (ORDER BY count(*) DESC, w.project) AS place
                   FROM waits w JOIN desks d ON d.id = w.desk WHERE d.seen_at > clock_timestamp() - interval '5 s' GROUP BY w.project
               ) ranked GROUP BY name""",
            most,
        )
    return dict(map(tuple, rows))


async def paths(db: Any, lately_seconds: float) -> list[PathCount]:
    """Every store by direction, from the sites that reported in the last so many seconds."""
    with reachable():
        rows = await db.fetch(
            """SELECT s.name, p.direction, count(*)::int,
                      percentile_cont(ARRAY[0, 0.5, 1]) WITHIN GROUP (ORDER BY p.bytes / p.busy_seconds) FILTER (WHERE p.busy_seconds > 0),
                      percentile_cont(ARRAY[0, 0.5, 1]) WITHIN GROUP (ORDER BY p.good / p.weight)
               FROM paths p JOIN stores s ON s.id = p.store_id
               WHERE p.weight > 0 AND p.updated_at > now() - make_interval(secs => $1) GROUP BY s.name, p.direction""",
            lately_seconds,
        )
    return [PathCount(*row) for row in rows]


async def deletions(db: Any) -> dict[str, int]:
    """Objects to be removed: ``waiting`` for their time, or ``failing`` since the store did not do it when it was asked."""
    with reachable():
        waiting, failing = await db.fetchrow(
            "SELECT count(*) FILTER (WHERE attempts = 0), count(*) FILTER (WHERE attempts > 0) FROM deletions"
        )
    return {"waiting": waiting, "failing": failing}


async def size(db: Any) -> int:
    """Bytes of the whole database."""
    with reachable():
        return int(await db.fetchval("SELECT pg_database_size(current_database())"))
