"""Whether what the catalogue counts is what it holds, and what became of it in a backup and back.

Rules
- ``slots.leased`` counts rows of leases; ``spaces.taken`` is the size of the replicas on a store, whatever their state, and what
  uploads have reserved. They change in the transactions that change the rows, so they differ only by a fault or by hand.
- Entries of the change log name transactions. In a database that came from another server by a dump they may name some that are
  still to come, and would be told to every broker again and again: they are dropped.
- A count is mended with its row locked first: who holds it then has ended, and who comes later counts for himself.
- What only an administrator can judge is told and left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker.catalog.connect import reachable
from broker.catalog.transaction import transaction


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. `mends` says whether `mend` puts it right."""

    what: str
    subject: str
    is_now: int
    should_be: int
    mends: bool


_LEASES = """
SELECT 'leases', s.name || ' ' || t.direction, t.leased, count(l.ticket_id)::int, true
FROM slots t JOIN stores s ON s.id = t.store_id LEFT JOIN leases l ON l.store_id = t.store_id AND l.direction = t.direction
GROUP BY s.name, t.direction, t.leased HAVING t.leased <> count(l.ticket_id) ORDER BY 2
"""

_SPACE = """
SELECT 'space', s.name, p.taken, h.held, true FROM spaces p JOIN stores s ON s.id = p.store_id CROSS JOIN LATERAL (
    SELECT (SELECT coalesce(sum(b.size), 0) FROM replicas r JOIN blobs b ON b.id = r.blob_id WHERE r.store_id = p.store_id)
         + (SELECT coalesce(sum(d.reserved), 0) FROM destinations d WHERE d.store_id = p.store_id) AS held) h
WHERE p.taken <> h.held ORDER BY 2
"""

_CHANGES = """
SELECT 'changes', 'of another server', count(*)::int, 0, true FROM changes
WHERE xact >= pg_snapshot_xmax(pg_current_snapshot()) HAVING count(*) > 0
"""

_TOLD = """
SELECT 'blobs', 'active, without a good replica', count(*)::int, 0, false FROM blobs b
WHERE b.state = 'active' AND NOT EXISTS (SELECT FROM replicas r WHERE r.blob_id = b.id AND r.state = 'active') HAVING count(*) > 0
UNION ALL
SELECT 'images', 'active, without an active blob', count(*)::int, 0, false FROM images i
WHERE i.status = 'active' AND NOT EXISTS (SELECT FROM image_blobs ib JOIN blobs b ON b.id = ib.blob_id
                                          WHERE ib.image_id = i.id AND b.state = 'active') HAVING count(*) > 0
"""


async def findings(db: Any) -> list[Finding]:
    """What is not as it should be, at one moment of the database. Raises `Unavailable`."""
    found = []
    with reachable():
        for query in (_LEASES, _SPACE, _CHANGES, _TOLD):
            found += [Finding(what, subject, int(now), int(due), mends) for what, subject, now, due, mends in await db.fetch(query)]
    return found


async def mend(db: Any) -> None:
    """Put right what can be, while brokers run. Raises `Unavailable`."""
    async with transaction(db) as connection:
        await connection.execute("SELECT FROM slots ORDER BY store_id, direction FOR UPDATE")
        await connection.execute(
            "UPDATE slots t SET leased = n FROM (SELECT t.store_id, t.direction, count(l.ticket_id) AS n FROM slots t"
            " LEFT JOIN leases l ON l.store_id = t.store_id AND l.direction = t.direction GROUP BY 1, 2) c"
            " WHERE c.store_id = t.store_id AND c.direction = t.direction AND t.leased <> n"
        )
    async with transaction(db) as connection:
        await connection.execute("SELECT FROM spaces ORDER BY store_id FOR UPDATE")
        await connection.execute(
            "UPDATE spaces p SET taken = held FROM (SELECT p.store_id,"
            " (SELECT coalesce(sum(b.size), 0) FROM replicas r JOIN blobs b ON b.id = r.blob_id WHERE r.store_id = p.store_id)"
            " + (SELECT coalesce(sum(d.reserved), 0) FROM destinations d WHERE d.store_id = p.store_id) AS held FROM spaces p) c"
            " WHERE c.store_id = p.store_id AND p.taken <> held"
        )
    with reachable():
        await db.execute("DELETE FROM changes WHERE xact >= pg_snapshot_xmax(pg_current_snapshot())")
