"""Tickets as they were recorded. Writing them is `broker.catalog.leases`' affair, since leases are granted with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from broker.catalog.connect import reachable
from broker.model import Operation


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """One ticket. `expired` is by the database's clock; `places` is what the service wrote."""

    id: UUID
    operation: Operation
    state: str
    project: str
    subject: str
    instance: str
    address: str
    site: str | None
    image_id: UUID | None
    blob_id: UUID
    size: int | None
    places: Any
    expires_at: float
    expired: bool
    why: Any = None
    """What there is to tell of the choice beside the places, and the file name to tell; ``None`` when there is nothing."""


FIELDS = """t.id, t.operation, t.state, t.project, t.subject, t.instance, t.address, t.site, t.image_id, t.blob_id, t.size, t.places,
    extract(epoch FROM t.expires_at)::float8, t.expires_at <= clock_timestamp(), t.why"""
"""What `read` makes a record of, of a table called t."""


def read(row: Sequence[Any]) -> TicketRecord:
    """The ticket in a row of `FIELDS`."""
    return TicketRecord(row[0], Operation(row[1]), *list(row)[2:])


async def get(db: Any, id: UUID) -> TicketRecord | None:
    """The ticket with this id."""
    with reachable():
        row = await db.fetchrow(f"SELECT {FIELDS} FROM tickets t WHERE t.id = $1", id)  # noqa: S608 - only the names above
    return None if row is None else read(row)


async def tell_why(db: Any, whys: Mapping[UUID, Any]) -> None:
    """Record why these tickets' places were chosen, beyond what is in them."""
    with reachable():
        await db.execute(
            "UPDATE tickets t SET why = w.why FROM unnest($1::uuid[], $2::jsonb[]) AS w (id, why) WHERE t.id = w.id",
            list(whys), list(whys.values()),
        )  # fmt: skip


async def release(db: Any, id: UUID) -> None:
    """Mark a ticket as given back."""
    with reachable():
        await db.execute("UPDATE tickets SET state = 'released' WHERE id = $1 AND state = 'open'", id)


async def extend(db: Any, id: UUID, seconds: float) -> float:
    """Let an open ticket end `seconds` from now, never sooner than before. Returns the instant."""
    with reachable():
        return float(
            await db.fetchval(
                """UPDATE tickets SET expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $2))
                   WHERE id = $1 RETURNING extract(epoch FROM expires_at)::float8""",
                id, seconds,
            )
        )  # fmt: skip


async def set_places(db: Any, id: UUID, places: Any) -> None:
    """Record the places anew, after one of them was activated."""
    with reachable():
        await db.execute("UPDATE tickets SET places = $2::jsonb WHERE id = $1", id, places)
