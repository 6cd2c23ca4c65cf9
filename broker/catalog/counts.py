"""How many things there are in each state, for metrics. Scans tables: to be asked once a minute, not more."""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.catalog.connect import reachable


class StateCount(NamedTuple):
    """`subject` is ``uploads``, ``replicas`` or ``images``."""

    subject: str
    state: str
    number: int


class SlotCount(NamedTuple):
    """Leases held on a store, and how many it allows."""

    store: str
    direction: str
    leased: int
    slots: int


async def states(db: Any) -> list[StateCount]:
    """Uploads and replicas by state, images by status."""
    with reachable():
        rows = await db.fetch(
            """SELECT 'uploads', state, count(*) FROM uploads GROUP BY state
               UNION ALL SELECT 'replicas', state, count(*) FROM replicas GROUP BY state
               UNION ALL SELECT 'images', status, count(*) FROM images GROUP BY status"""
        )
    return [StateCount(*row) for row in rows]


async def slots(db: Any) -> list[SlotCount]:
    """Every store that has slots, by direction."""
    with reachable():
        rows = await db.fetch(
            """SELECT t.name, s.direction, s.leased, s.slots FROM slots s JOIN stores t ON t.id = s.store_id
               WHERE s.slots IS NOT NULL ORDER BY t.name, s.direction"""
        )
    return [SlotCount(*row) for row in rows]
