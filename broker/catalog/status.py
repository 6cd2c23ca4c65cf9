"""What the status page shows of the catalogue: one consistent reading, a handful of statements, each with a bound.

Rules: a reading is one read-only snapshot, so that its numbers agree. Of tickets and reports only the newest are looked at,
by their ids, whose order is that of time; nothing here grows with the age of the catalogue. Who may see what is asked here
already: rows of others, and of private stores, do not leave the database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from broker.catalog.connect import reachable
from broker.catalog.contention import DEAD_SECONDS
from broker.catalog.images import MEMBERS, VETTED, VISIBILITY, members_of
from broker.catalog.path_pages import PathRow
from broker.model import Operation, Visibility
from broker.paths import PathAverage

YOUNG = 2000
"""So many of the newest tickets are looked through; those with a lease are found however old they are."""


class Scope(NamedTuple):
    """Whose reading it is: `everything`, else the tickets of one principal; with `private` stores or without."""

    everything: bool
    private: bool
    project: str
    subject: str


class Bounds(NamedTuple):
    """How many rows of each kind are read at most; `size` is that of the transfer by which paths are compared."""

    transfers: int
    decisions: int
    outcomes: int
    paths: int
    waits: int
    size: int


class LeaseSeen(NamedTuple):
    """A lease in force."""

    store_id: int
    expected_at: float
    """When its transfer should be over."""
    expires_at: float


class WaitSeen(NamedTuple):
    """A request that waits for a slot on one of these stores. `priority` is how much its role counts."""

    project: str
    direction: str
    store_ids: tuple[int, ...]
    bytes: int
    priority: float
    asked_at: float


class ImageSeen(NamedTuple):
    """The image that a ticket names, as it is now, as far as that decides who may learn its name."""

    name: str
    project: str
    visibility: Visibility
    members: tuple[str, ...]
    is_withheld: bool


class TicketSeen(NamedTuple):
    """A ticket as it stands. `places` and `why` are what the service wrote; `reported` maps stores to outcomes; `upload` is an upload's
    state."""

    id: UUID
    operation: Operation
    state: str
    project: str
    subject: str
    instance: str
    address: str
    site: str | None
    size: int | None
    places: Any
    expires_at: float
    expired: bool
    image: ImageSeen | None
    leases: tuple[LeaseSeen, ...]
    reported: Mapping[int, str]
    upload: str | None
    why: Any

    @property
    def asked_at(self) -> float:
        """When it was asked for: a UUID of version 7 begins with its milliseconds."""
        return (self.id.int >> 80) / 1000.0


class OutcomeSeen(NamedTuple):
    """A report, with the places of its ticket."""

    operation: Operation
    places: Any
    store_id: int
    outcome: str
    bytes: int
    seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading, as of the instant `at` by the database's clock; lists are newest first, paths worst first."""

    at: float
    leased: Mapping[tuple[int, str], int]
    """Leases in force by (store, direction)."""
    transfers: tuple[TicketSeen, ...]
    transfer_count: int
    decisions: tuple[TicketSeen, ...]
    outcomes: tuple[OutcomeSeen, ...]
    paths: tuple[PathRow, ...]
    path_count: int
    waits: tuple[WaitSeen, ...]
    """Those that wait longest first; only with everything."""
    wait_count: int


_LEASED = """
SELECT store_id, direction, count(*)::int FROM leases WHERE expires_at > now() GROUP BY store_id, direction
"""

_TICKET = f"""
t.id, t.operation, t.state, t.project, t.subject, t.instance, t.address, t.site, t.size, t.places,
extract(epoch FROM t.expires_at)::float8, t.expires_at <= now(), i.name, i.project, {VISIBILITY},
(SELECT jsonb_agg(jsonb_build_array(l.store_id, extract(epoch FROM coalesce(l.expected_at, l.expires_at)),
                                    extract(epoch FROM l.expires_at)))
 FROM leases l WHERE l.ticket_id = t.id AND l.expires_at > now()),
(SELECT jsonb_agg(jsonb_build_array(r.store_id, r.outcome)) FROM reports r WHERE r.ticket_id = t.id),
u.state, t.why, {MEMBERS}, NOT {VETTED}
"""  # noqa: S608 - no value of a request is in it

# $1 everything, $2 project, $3 subject, $4 how many; a ticket is under way while it holds a lease, or may be used and was not reported.
# An array and a count, where IN and NOT EXISTS would say the same: those the planner turns into a scan of every ticket and report.
_TRANSFERS = f"""
WITH young AS MATERIALIZED (
    SELECT id FROM tickets ORDER BY id DESC LIMIT {YOUNG}
), leased AS MATERIALIZED (
    SELECT DISTINCT ticket_id AS id FROM leases WHERE expires_at > now() ORDER BY id DESC LIMIT {YOUNG}
)
SELECT {_TICKET}, count(*) OVER ()::int
FROM unnest(ARRAY(SELECT id FROM young UNION SELECT id FROM leased)) AS a (id) JOIN tickets t ON t.id = a.id
LEFT JOIN images i ON i.id = t.image_id LEFT JOIN uploads u ON u.id = t.id
WHERE t.state = 'open' AND t.expires_at > now()
  AND ($1 OR (t.project = $2 AND t.subject = $3)) AND (u.id IS NULL OR u.state IN ('open', 'committing'))
  AND (t.id IN (SELECT id FROM leased) OR (SELECT count(*) FROM reports r WHERE r.ticket_id = t.id) = 0)
ORDER BY t.id DESC LIMIT $4
"""  # noqa: S608 - no value of a request is in it

_DECISIONS = f"""
SELECT {_TICKET}
FROM (SELECT * FROM tickets ORDER BY id DESC LIMIT {YOUNG}) t
LEFT JOIN images i ON i.id = t.image_id LEFT JOIN uploads u ON u.id = t.id
WHERE $1 OR (t.project = $2 AND t.subject = $3)
ORDER BY t.id DESC LIMIT $4
"""  # noqa: S608 - no value of a request is in it

_OUTCOMES = f"""
SELECT t.operation, t.places, r.store_id, r.outcome, r.bytes, r.seconds, extract(epoch FROM r.at)::float8
FROM (SELECT * FROM reports ORDER BY ticket_id DESC, store_id LIMIT {YOUNG}) r JOIN tickets t ON t.id = r.ticket_id
WHERE $1 OR (t.project = $2 AND t.subject = $3)
ORDER BY r.ticket_id DESC, r.store_id LIMIT $4
"""  # noqa: S608 - no value of a request is in it

# Worst is what takes a transfer of $2 bytes longest, chance of success included. What belongs to a narrower site is told
# there: in this order a site stands right before the first one within it.
_PATHS = """
WITH told AS (
    SELECT p.*, s.name, coalesce(starts_with(
               lead(p.site) OVER (PARTITION BY p.store_id, p.direction ORDER BY replace(p.site, '/', chr(1)) COLLATE "C"), p.site || '/'
           ), false) AS wider
    FROM paths p JOIN stores s ON s.id = p.store_id
    WHERE ($1 OR s.exposure = 'public') AND p.site <> '' AND p.weight > 0 AND p.updated_at > now() - interval '1 day'
)
SELECT site, name, direction, weight, good, bytes, busy_seconds, setup_weight, setup, extract(epoch FROM updated_at)::float8,
       count(*) OVER ()::int
FROM told WHERE NOT wider
ORDER BY (coalesce(setup / nullif(setup_weight, 0), 0) + $2 * busy_seconds / nullif(bytes, 0)) / greatest(good / weight, 0.05)
         DESC NULLS FIRST, site, name, direction
LIMIT $3
"""

_WAITS = """
SELECT w.project, w.direction, w.store_ids, w.bytes, w.priority, extract(epoch FROM w.asked_at)::float8, count(*) OVER ()::int
FROM waits w JOIN desks d ON d.id = w.desk WHERE d.seen_at > now() - make_interval(secs => $1) ORDER BY w.asked_at LIMIT $2
"""


async def read(db: asyncpg.Pool[asyncpg.Record], scope: Scope, bounds: Bounds) -> Reading:
    """A reading for `scope`. Raises `errors.Unavailable`."""
    whose = (scope.everything, scope.project, scope.subject)
    with reachable():
        async with db.acquire(timeout=5) as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            at = await connection.fetchval("SELECT extract(epoch FROM now())::float8")
            leased = await connection.fetch(_LEASED) if scope.everything else []
            transfers = await connection.fetch(_TRANSFERS, *whose, bounds.transfers)
            decisions = await connection.fetch(_DECISIONS, *whose, bounds.decisions)
            outcomes = await connection.fetch(_OUTCOMES, *whose, bounds.outcomes)
            waits = await connection.fetch(_WAITS, DEAD_SECONDS, bounds.waits) if scope.everything else []
            paths = await connection.fetch(_PATHS, scope.private, float(bounds.size), bounds.paths)
    return Reading(
        at=at,
        leased={(row[0], row[1]): row[2] for row in leased},
        transfers=tuple(map(_ticket, transfers)),
        transfer_count=transfers[0][-1] if transfers else 0,
        decisions=tuple(map(_ticket, decisions)),
        outcomes=tuple(OutcomeSeen(Operation(row[0]), *list(row)[1:]) for row in outcomes),
        paths=tuple(PathRow(row[0], row[1], row[2], PathAverage(*list(row)[3:10])) for row in paths),
        path_count=paths[0][-1] if paths else 0,
        waits=tuple(WaitSeen(row[0], row[1], tuple(row[2]), *row[3:6]) for row in waits),
        wait_count=waits[0][-1] if waits else 0,
    )


def _ticket(row: Any) -> TicketSeen:
    image = None if row[12] is None else ImageSeen(row[12], row[13], Visibility(row[14]), members_of(row[19]), row[20])
    leases = tuple(LeaseSeen(int(store), float(expected), float(expires)) for store, expected, expires in row[15] or ())
    return TicketSeen(
        id=row[0],
        operation=Operation(row[1]),
        state=row[2],
        project=row[3],
        subject=row[4],
        instance=row[5],
        address=row[6],
        site=row[7],
        size=row[8],
        places=row[9],
        expires_at=row[10],
        expired=row[11],
        image=image,
        leases=leases,
        reported=dict(row[16] or ()),
        upload=row[17],
        why=row[18],
    )
