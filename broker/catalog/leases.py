"""Tickets and leases: one statement grants those of many requests, and the database decides (invariant 3).

Where nobody has to wait, this file's statement grants. Stores that are asked for more than they have, or that somebody waits for,
and projects with limits are `broker.catalog.contention`'s affair, which decides whose turn it is.

Rules
- A store with slots is locked by its row in `slots`, rows always in the order (store, direction), so that brokers never
  wait for each other in a circle. `slots.leased` counts the rows of `leases`; expired ones stay counted until `sweep`.
- Instants are the database's own. No transaction spans two round trips: a broker that is stopped holds no lock.
- A new ticket is written only if it got a lease, or needs none. An id that exists already is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker.catalog import contention
from broker.catalog.connect import reachable
from broker.catalog.contention import Seen, json_rows, ticket_rows
from broker.model import Direction, Operation


class TicketRow(NamedTuple):
    """A ticket to be written. `places` is JSON; what it says is the service's affair."""

    operation: Operation
    project: str
    subject: str
    instance: str
    address: str
    site: str | None
    image_id: UUID | None
    blob_id: UUID | str
    size: int | None
    places: orjson.Fragment
    ttl_seconds: float


class Want(NamedTuple):
    """A lease asked for: on which store, in which direction, for how long.

    `seconds` is until it ends by itself, `expected_seconds` until its transfer should be done; `bytes` is what it moves.
    """

    store_id: int
    direction: str
    seconds: float
    expected_seconds: float = 0.0
    bytes: int = 0


class Party(NamedTuple):
    """Who asks, as far as sharing goes: a project at one priority, its weight (the priority included), and its limits if any."""

    project: str = ""
    priority: float = 1.0
    weight: float = 1.0
    max_leases: int | None = None
    max_bytes: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether its leases are counted, on stores without slots too."""
        return self.max_leases is not None or self.max_bytes is not None


NOBODY = Party()


class GrantRequest(NamedTuple):
    """Leases for a ticket that is to be written (`ticket` given) or exists already. `needs_lease`: without one, no ticket.

    The ticket's id is text here, in canonical form: to compare and to encode UUIDs costs more than the rest of a row.
    `waits` says that the request stands in `broker.catalog.waits`.
    """

    id: str
    ticket: TicketRow | None
    wants: Sequence[Want]
    needs_lease: bool
    party: Party = NOBODY
    waits: bool = False


class Grant(NamedTuple):
    """The database's answer."""

    expires_at: float | None
    """When the ticket ends; ``None`` when it existed, or got none of the leases it needed and was not written."""
    leases: Mapping[int, float]
    """Store id to the end of the lease."""
    over_limit: bool = False
    """A lease was refused since the project holds as much as it may."""

    @property
    def created(self) -> bool:
        """Whether the ticket was written."""
        return self.expires_at is not None


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """One lease as it stands."""

    store_id: int
    direction: Direction
    granted_at: float
    expires_at: float


# $1: the tickets, $2: the leases wanted (`contention.json_rows`). A store that is asked for more than it has, or that somebody waits
# for, grants nothing here.
_GRANT = f"""
WITH ticket AS MATERIALIZED ({ticket_rows("$1")}), want AS MATERIALIZED (
    SELECT (r->>0)::uuid AS ticket_id, (r->>1)::int AS store_id, r->>2 AS direction, (r->>3)::float8 AS ttl, (r->>4)::float8 AS expected,
           (r->>5)::bigint AS bytes, r->>6 AS project, (r->>7)::float8 AS priority
    FROM jsonb_array_elements($2::text::jsonb) AS w (r)
), locked AS MATERIALIZED (
    SELECT store_id, direction, slots, leased FROM slots
    WHERE (store_id, direction) IN (SELECT store_id, direction FROM want)
    ORDER BY store_id, direction FOR UPDATE
), fitting AS MATERIALIZED (
    SELECT * FROM (
        SELECT w.*, l.slots, l.leased, count(*) OVER (PARTITION BY w.store_id, w.direction) AS n
        FROM want w JOIN locked l USING (store_id, direction)
    ) asked
    WHERE (slots IS NULL OR leased + n <= slots)
      AND NOT EXISTS (SELECT FROM waits WHERE waits.direction = asked.direction AND asked.store_id = ANY (waits.store_ids))
), written AS (
    INSERT INTO tickets (id, operation, project, subject, instance, address, site, image_id, blob_id, size, places, expires_at)
    SELECT id, operation, project, subject, instance, address, site, image_id, blob_id, size, places,
           clock_timestamp() + make_interval(secs => ttl)
    FROM ticket WHERE NOT needs_lease OR id IN (SELECT ticket_id FROM fitting)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, expires_at
), leased AS (
    INSERT INTO leases (ticket_id, store_id, direction, project, priority, bytes, expected_at, expires_at)
    SELECT ticket_id, store_id, direction, project, priority, bytes,
           clock_timestamp() + make_interval(secs => expected), clock_timestamp() + make_interval(secs => ttl)
    FROM fitting WHERE ticket_id IN (SELECT id FROM written) OR ticket_id NOT IN (SELECT id FROM ticket)
    ON CONFLICT (ticket_id, store_id) DO NOTHING
    RETURNING ticket_id, store_id, direction, expires_at
), counted AS (
    UPDATE slots s SET leased = s.leased + c.n
    FROM (SELECT store_id, direction, count(*)::int AS n FROM leased GROUP BY store_id, direction) c
    WHERE s.store_id = c.store_id AND s.direction = c.direction
    RETURNING s.store_id, s.direction, s.leased
)
SELECT id::text, NULL::int AS store_id, NULL::text AS direction, extract(epoch FROM expires_at)::float8 AS at FROM written
UNION ALL SELECT ticket_id::text, store_id, direction, extract(epoch FROM expires_at)::float8 FROM leased
UNION ALL SELECT NULL, l.store_id, l.direction, coalesce((SELECT c.leased FROM counted c
    WHERE c.store_id = l.store_id AND c.direction = l.direction), l.leased)::float8 FROM locked l
"""  # noqa: S608 - the query above

# Tickets that want no lease touch no store: the common case gets the short statement.
_WRITE = f"""
INSERT INTO tickets (id, operation, project, subject, instance, address, site, image_id, blob_id, size, places, expires_at)
SELECT id, operation, project, subject, instance, address, site, image_id, blob_id, size, places,
       clock_timestamp() + make_interval(secs => ttl)
FROM ({ticket_rows("$1")}) ticket
ON CONFLICT (id) DO NOTHING
RETURNING id::text, NULL::int AS store_id, NULL::text AS direction, extract(epoch FROM expires_at)::float8 AS at
"""  # noqa: S608 - the query above


async def grant(connection: Any, requests: Sequence[GrantRequest]) -> Sequence[tuple[Grant, dict[tuple[int, str], int]]]:
    """Write the tickets and grant the leases of all `requests`.

    Each answer comes with how many leases the stores that were asked hold now, by (store id, direction): the same
    mapping for all of a batch.
    """
    seen = Seen({}, {}, {}, set())
    first = [request for request in requests if not (request.wants and (request.waits or request.party.is_limited))]
    tickets = json_rows([(r.id, *r.ticket, r.needs_lease) for r in first if r.ticket is not None])
    wants = [(r.id, *want, r.party.project, r.party.priority) for r in first for want in r.wants]
    if wants:
        seen.take(await connection.fetch(_GRANT, tickets, json_rows(wants)))
    elif first:
        seen.take(await connection.fetch(_WRITE, tickets))
    if len(seen.leases) < len(requests):
        contended = [left for request in requests if request.wants and (left := _left(request, seen)) is not None]
        if contended:
            await contention.grant(connection, contended, seen)
    return [(Grant(seen.ends.get(r.id), seen.leases.get(r.id, _NO_LEASES), r.id in seen.over_limit), seen.held) for r in requests]


def _left(request: GrantRequest, seen: Seen) -> GrantRequest | None:
    """What of a request was not granted yet; ``None`` when nothing is left."""
    granted = seen.leases.get(request.id, _NO_LEASES)
    if len(granted) == len(request.wants):
        return None
    wants = [want for want in request.wants if want.store_id not in granted]
    return request._replace(ticket=None if request.id in seen.ends else request.ticket, wants=wants)


_NO_LEASES: Mapping[int, float] = {}


# Sums of how long leases lasted shrink by a twentieth at each lease that ends.
_RELEASE = """
WITH locked AS MATERIALIZED (
    SELECT store_id, direction FROM slots WHERE (store_id, direction) IN (
        SELECT l.store_id, l.direction FROM leases l
        JOIN unnest($1::uuid[], $2::int[]) AS w (ticket_id, store_id)
            ON l.ticket_id = w.ticket_id AND (w.store_id IS NULL OR l.store_id = w.store_id))
    ORDER BY store_id, direction FOR UPDATE
), used AS MATERIALIZED (
    SELECT project FROM usage WHERE (SELECT count(*) FROM locked) >= 0 AND project IN (
        SELECT l.project FROM leases l WHERE l.counted AND l.ticket_id = ANY ($1::uuid[]))
    ORDER BY project FOR UPDATE
), gone AS (
    DELETE FROM leases l USING unnest($1::uuid[], $2::int[]) AS w (ticket_id, store_id)
    WHERE l.ticket_id = w.ticket_id AND (w.store_id IS NULL OR l.store_id = w.store_id)
      AND (SELECT count(*) FROM locked) >= 0 AND (SELECT count(*) FROM used) >= 0
      AND (l.store_id, l.direction) IN (SELECT store_id, direction FROM locked)
    RETURNING l.store_id, l.direction, extract(epoch FROM clock_timestamp() - l.granted_at)::float8 AS lasted,
              extract(epoch FROM coalesce(l.expected_at, clock_timestamp()) - l.granted_at)::float8 AS expected
), counted AS (
    UPDATE slots s SET leased = s.leased - c.n, ended = s.ended * power(0.95, c.n) + c.n,
                       lasted_seconds = s.lasted_seconds * power(0.95, c.n) + c.lasted,
                       expected_seconds = s.expected_seconds * power(0.95, c.n) + c.expected
    FROM (SELECT store_id, direction, count(*)::int AS n, sum(lasted) AS lasted, sum(expected) AS expected
          FROM gone GROUP BY store_id, direction) c
    WHERE s.store_id = c.store_id AND s.direction = c.direction
)
SELECT pg_notify('slots', '') WHERE EXISTS (SELECT FROM gone) AND EXISTS (SELECT FROM waits)
"""


async def release(db: Any, leases: Sequence[tuple[UUID, int | None]]) -> None:
    """Give leases back, by ticket and store id; ``None`` stands for all of the ticket's. What is gone already is no error."""
    with reachable():
        await db.execute(_RELEASE, [ticket for ticket, _ in leases], [store for _, store in leases])


# One instant for all of it: what ends while locks are waited for is the next sweep's, else its project would not be locked.
_SWEEP = """
WITH locked AS MATERIALIZED (
    SELECT store_id, direction FROM slots
    WHERE leased > 0 AND EXISTS (SELECT FROM leases l WHERE l.store_id = slots.store_id AND l.direction = slots.direction
                                 AND l.expires_at <= statement_timestamp())
    ORDER BY store_id, direction FOR UPDATE
), used AS MATERIALIZED (
    SELECT project FROM usage WHERE (SELECT count(*) FROM locked) >= 0 AND project IN (
        SELECT l.project FROM leases l JOIN locked USING (store_id, direction) WHERE l.counted AND l.expires_at <= statement_timestamp())
    ORDER BY project FOR UPDATE
), gone AS (
    DELETE FROM leases l USING locked k
    WHERE (SELECT count(*) FROM locked) > 0 AND (SELECT count(*) FROM used) >= 0
      AND l.store_id = k.store_id AND l.direction = k.direction AND l.expires_at <= statement_timestamp()
    RETURNING l.store_id, l.direction
), counted AS (
    UPDATE slots s SET leased = s.leased - c.n
    FROM (SELECT store_id, direction, count(*)::int AS n FROM gone GROUP BY store_id, direction) c
    WHERE s.store_id = c.store_id AND s.direction = c.direction
), told AS MATERIALIZED (
    SELECT pg_notify('slots', '') WHERE EXISTS (SELECT FROM gone) AND EXISTS (SELECT FROM waits)
)
SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM told)
"""


async def sweep(db: Any) -> int:
    """Take expired leases off their stores' counts. Returns how many there were."""
    with reachable():
        return int(await db.fetchval(_SWEEP))


async def renew(
    db: Any, ticket: UUID, store_id: int, seconds: float, most_seconds: float, expected_seconds: float | None = None
) -> float | None:
    """Let an unexpired lease end `seconds` from now, yet no later than `most_seconds` after its grant. ``None``: there is none.

    Its transfer is expected to be done in `expected_seconds`, where that is known better now.
    """
    with reachable():
        at = await db.fetchval(
            """UPDATE leases SET expires_at = greatest(expires_at, least(clock_timestamp() + make_interval(secs => $3),
                                                                         granted_at + make_interval(secs => $4))),
                                 expected_at = coalesce(clock_timestamp() + make_interval(secs => $5), expected_at)
               WHERE ticket_id = $1 AND store_id = $2 AND expires_at > clock_timestamp()
               RETURNING extract(epoch FROM expires_at)::float8""",
            ticket, store_id, seconds, most_seconds, expected_seconds,
        )  # fmt: skip
    return None if at is None else float(at)


async def held(db: Any, ticket: UUID) -> list[LeaseRow]:
    """The unexpired leases of a ticket."""
    with reachable():
        rows = await db.fetch(
            """SELECT store_id, direction, extract(epoch FROM granted_at)::float8, extract(epoch FROM expires_at)::float8
               FROM leases WHERE ticket_id = $1 AND expires_at > clock_timestamp()""",
            ticket,
        )
    return [LeaseRow(row[0], Direction(row[1]), row[2], row[3]) for row in rows]


class SlotsRow(NamedTuple):
    """How full a store is in one direction; `taken` is in bytes and the same for both."""

    store_id: int
    direction: str
    leased: int
    taken: int


async def slots_taken(db: Any) -> list[SlotsRow]:
    """Leases and space taken, of every store and direction."""
    with reachable():
        rows = await db.fetch(
            "SELECT s.store_id, s.direction, s.leased, coalesce(p.taken, 0) FROM slots s LEFT JOIN spaces p ON p.store_id = s.store_id"
        )
    return [SlotsRow(*row) for row in rows]
