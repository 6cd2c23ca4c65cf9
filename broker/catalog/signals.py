"""Tickets and uploads about which nobody has said a word, looked at once each in the order of time.

Rules
- A watermark is moved by one broker at a time; others find it locked and have nothing to do. What lies longer ago than
  `LOOK_BACK_SECONDS` is passed over: after a pause it says nothing of the present.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.catalog.connect import reachable
from broker.catalog.tickets import FIELDS, TicketRecord, read

LOOK_BACK_SECONDS = 900.0

_MOST = 5000


class Span(NamedTuple):
    """A stretch of time, after `begins` and up to `ends`, as POSIX seconds."""

    begins: float
    ends: float


class Sent(NamedTuple):
    """A committed upload on which there is no report: `seconds` from the ticket until the client said that everything is there."""

    ticket: TicketRecord
    store_id: int
    size: int
    seconds: float


async def claim(db: Any, name: str, delay_seconds: float = 0.0) -> Span | None:
    """Take the time since the last claim, up to `delay_seconds` ago; ``None`` when another broker is taking it."""
    with reachable():
        row = await db.fetchrow(
            """WITH old AS MATERIALIZED (SELECT name, at FROM watermarks WHERE name = $1 FOR UPDATE SKIP LOCKED)
               UPDATE watermarks w SET at = greatest(w.at, clock_timestamp() - make_interval(secs => $2)) FROM old WHERE w.name = old.name
               RETURNING extract(epoch FROM greatest(old.at, w.at - make_interval(secs => $3)))::float8,
                         extract(epoch FROM w.at)::float8""",
            name, delay_seconds, LOOK_BACK_SECONDS,
        )  # fmt: skip
    return None if row is None else Span(*row)


async def expired(db: Any, span: Span) -> list[TicketRecord]:
    """Download tickets that ended in that time, on which there is no report and which were not given back."""
    with reachable():
        rows = await db.fetch(
            f"""SELECT {FIELDS} FROM tickets t
                WHERE expires_at > to_timestamp($1) AND expires_at <= to_timestamp($2) AND state = 'open' AND operation = 'download'
                  AND NOT EXISTS (SELECT FROM reports r WHERE r.ticket_id = t.id) LIMIT $3""",  # noqa: S608 - only our own names
            *span, _MOST,
        )  # fmt: skip
    return [read(row) for row in rows]


async def unsettled(db: Any, tickets: Sequence[UUID]) -> list[TicketRecord]:
    """Those of the tickets that are open still, and on which there is no report."""
    with reachable():
        rows = await db.fetch(
            f"""SELECT {FIELDS} FROM tickets t WHERE id = ANY ($1::uuid[]) AND state = 'open' AND expires_at > clock_timestamp()
                AND NOT EXISTS (SELECT FROM reports r WHERE r.ticket_id = t.id)""",  # noqa: S608 - only our own names
            list(tickets),
        )
    return [read(row) for row in rows]


async def committed(db: Any, span: Span) -> list[Sent]:
    """Uploads that were committed in that time and whose bytes were sent, on which there is no report."""
    with reachable():
        rows = await db.fetch(
            f"""SELECT {FIELDS}, r.store_id, u.size, extract(epoch FROM u.sent_at - u.created_at)::float8
                FROM uploads u JOIN replicas r ON r.id = u.replica_id JOIN tickets t ON t.id = u.id
                WHERE u.state = 'committed' AND u.touched_at > to_timestamp($1) AND u.touched_at <= to_timestamp($2)
                  AND u.sent_at IS NOT NULL AND u.size IS NOT NULL
                  AND NOT EXISTS (SELECT FROM reports p WHERE p.ticket_id = t.id AND p.store_id = r.store_id) LIMIT $3""",  # noqa: S608
            *span, _MOST,
        )  # fmt: skip
    return [Sent(read(list(row)[:-3]), *list(row)[-3:]) for row in rows]
