"""Which stores failed which clients a moment ago: they are not offered them until that is over, by no broker.

Rows are written with the reports that tell of them (`broker.catalog.reports`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.catalog.connect import reachable


class Failure(NamedTuple):
    """One exclusion. `left_seconds` is what is left of it by the database's clock, since those of brokers differ."""

    client: str
    store_id: int
    left_seconds: float


_LEFT = "SELECT client, store_id, extract(epoch FROM until - clock_timestamp())::float8 FROM failures WHERE until > clock_timestamp()"


async def in_force(db: Any, limit: int) -> list[Failure]:
    """Every exclusion in force, those that last longest first, at most `limit`."""
    with reachable():
        return [Failure(*row) for row in await db.fetch(f"{_LEFT} ORDER BY until DESC LIMIT $1", limit)]


async def of_clients(db: Any, clients: Sequence[str]) -> list[Failure]:
    """The exclusions of these clients that are in force."""
    with reachable():
        return [Failure(*row) for row in await db.fetch(f"{_LEFT} AND client = ANY ($1::text[])", list(clients))]


async def forget_old(db: Any) -> None:
    """Drop exclusions that are over."""
    with reachable():
        await db.execute(  # what a report is about to renew is left to it: nobody waits for rows that a report holds in its own order
            """DELETE FROM failures WHERE (client, store_id) IN (
                   SELECT client, store_id FROM failures WHERE until < clock_timestamp() FOR UPDATE SKIP LOCKED)"""
        )
