"""Leases where more is asked for than there is: whose turn it is, and what a project may hold, decided by the database.

A store's free slots go to its *contenders* in the order of `broker.turns`: the requests of this statement and those that wait
(`broker.catalog.waits`), whichever broker they wait at. Of those whose turn it is, the requests of this statement get leases; the
others' slots are left to them. The pure function and this SQL agree; a test holds them together.

Rules
- Locks are taken in one order everywhere: rows of `slots` by (store, direction), then rows of `usage` by project. Under READ COMMITTED
  what is read without a lock may be older than a lock that was waited for: so slots and limits are checked against locked
  rows alone, and are exact; who comes first is decided by a view some milliseconds old.
- A project at its limit contends for nothing, so that no slot is kept free for it.
- What is asked of a store without a free slot counts nothing against the limit of what is asked for after it.
- Who has a lease waits no more, even while its row is still there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from broker.catalog.connect import reachable
from broker.model import Direction
from broker.turns import Contender, Line, Party, Under

if TYPE_CHECKING:
    from broker.catalog.leases import GrantRequest

DEAD_SECONDS = 2.0
"""A broker that was not seen for so long has nobody waiting."""


def json_rows(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as one parameter, JSON with an array for each.

    The driver takes longer for one value of an array of its own than this takes for a row.
    """
    return orjson.dumps(rows, default=str).decode()  # the driver has UUIDs of its own


def ticket_rows(parameter: str) -> str:
    """The query of the tickets in such a parameter; each is its id, a `leases.TicketRow`, and whether it needs a lease."""
    return f"""
    SELECT (r->>0)::uuid AS id, r->>1 AS operation, r->>2 AS project, r->>3 AS subject, r->>4 AS instance, r->>5 AS address,
           r->>6 AS site, (r->>7)::uuid AS image_id, (r->>8)::uuid AS blob_id, (r->>9)::bigint AS size, r->10 AS places,
           (r->>11)::float8 AS ttl, (r->>12)::bool AS needs_lease
    FROM jsonb_array_elements({parameter}::text::jsonb) AS t (r)
"""  # noqa: S608 - a parameter's number


# What waits for the stores of `free`: needs $1, the seconds after which a broker counts as dead.
_WAITING = """
    SELECT w.id, f.store_id, w.direction, w.project, w.priority, w.weight, w.asked_at, w.desk
    FROM waits w JOIN desks d ON d.id = w.desk JOIN free f ON f.direction = w.direction AND f.store_id = ANY (w.store_ids)
    WHERE d.seen_at > clock_timestamp() - make_interval(secs => $1)
      AND NOT EXISTS (SELECT FROM leases l WHERE l.ticket_id = w.id)
      AND NOT EXISTS (SELECT FROM usage u WHERE u.project = w.project
                      AND (u.leases >= w.max_leases OR u.bytes + w.bytes > w.max_bytes))
"""

# From `free` (store_id, direction, slots, leased) and `contender` to the place of each: the order of `broker.turns.order`.
_PLACED = """
held AS MATERIALIZED (
    SELECT l.store_id, l.direction, l.project, l.priority, count(*) AS held
    FROM leases l JOIN free USING (store_id, direction)
    WHERE l.expires_at > clock_timestamp() GROUP BY l.store_id, l.direction, l.project, l.priority
), placed AS MATERIALIZED (
    SELECT n.*, row_number() OVER (PARTITION BY n.store_id, n.direction
                                   ORDER BY (coalesce(h.held, 0) + n.n) / n.weight, n.asked_at, n.id) AS place
    FROM (SELECT c.*, row_number() OVER (PARTITION BY store_id, direction, project, priority ORDER BY asked_at, id) AS n
          FROM contender c) n
    LEFT JOIN held h ON (h.store_id, h.direction, h.project, h.priority) = (n.store_id, n.direction, n.project, n.priority)
)
"""

# $2: the tickets, $3: the leases wanted (`json_rows`). New requests ask now, one after the other.
_GRANT = f"""
WITH ticket AS MATERIALIZED ({ticket_rows("$2")}), want AS MATERIALIZED (
    SELECT (r->>0)::uuid AS ticket_id, (r->>1)::int AS store_id, r->>2 AS direction, (r->>3)::float8 AS ttl, (r->>4)::float8 AS expected,
           (r->>5)::bigint AS bytes, r->>6 AS project, (r->>7)::float8 AS priority, (r->>8)::float8 AS weight,
           (r->>9)::int AS max_leases, (r->>10)::bigint AS max_bytes, seq
    FROM jsonb_array_elements($3::text::jsonb) WITH ORDINALITY AS w (r, seq)
), free AS MATERIALIZED (
    SELECT store_id, direction, slots, leased FROM slots
    WHERE (store_id, direction) IN (SELECT store_id, direction FROM want)
    ORDER BY store_id, direction FOR UPDATE
), used AS MATERIALIZED (
    SELECT project, leases, bytes FROM usage
    WHERE (SELECT count(*) FROM free) >= 0
      AND project IN (SELECT project FROM want WHERE max_leases IS NOT NULL OR max_bytes IS NOT NULL)
    ORDER BY project FOR UPDATE
), within AS MATERIALIZED (
    SELECT w.*, (max_leases IS NULL OR leases_then <= max_leases) AND (max_bytes IS NULL OR bytes_then <= max_bytes) AS allowed
    FROM (SELECT w.*, coalesce(u.leases, 0) + 1 + count(*) FILTER (WHERE has_room) OVER earlier AS leases_then,
                 coalesce(u.bytes, 0) + w.bytes + coalesce(sum(w.bytes) FILTER (WHERE has_room) OVER earlier, 0) AS bytes_then
          FROM (SELECT w.*, f.slots IS NULL OR f.leased < f.slots AS has_room FROM want w LEFT JOIN free f USING (store_id, direction)) w
          LEFT JOIN used u USING (project)
          WINDOW earlier AS (PARTITION BY w.project ORDER BY w.seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)) w
), contender AS MATERIALIZED (
    SELECT w.ticket_id AS id, w.store_id, w.direction, w.project, w.priority, w.weight,
           coalesce(q.asked_at, statement_timestamp() + w.seq * interval '1 microsecond') AS asked_at, NULL::uuid AS desk
    FROM within w LEFT JOIN waits q ON q.id = w.ticket_id WHERE w.allowed
    UNION ALL
    SELECT * FROM ({_WAITING} AND w.id NOT IN (SELECT ticket_id FROM want)) waiting
), {_PLACED}, fitting AS MATERIALIZED (
    SELECT w.* FROM within w JOIN free f USING (store_id, direction)
    JOIN placed p ON p.id = w.ticket_id AND p.store_id = w.store_id AND p.direction = w.direction
    WHERE w.allowed AND (f.slots IS NULL OR p.place <= f.slots - f.leased)
), written AS (
    INSERT INTO tickets (id, operation, project, subject, instance, address, site, image_id, blob_id, size, places, expires_at)
    SELECT id, operation, project, subject, instance, address, site, image_id, blob_id, size, places,
           clock_timestamp() + make_interval(secs => ttl)
    FROM ticket WHERE NOT needs_lease OR id IN (SELECT ticket_id FROM fitting)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, expires_at
), leased AS (
    INSERT INTO leases (ticket_id, store_id, direction, project, priority, bytes, counted, expected_at, expires_at)
    SELECT ticket_id, store_id, direction, project, priority, bytes, max_leases IS NOT NULL OR max_bytes IS NOT NULL,
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
UNION ALL SELECT ticket_id::text, store_id, NULL, NULL FROM within WHERE NOT allowed
UNION ALL SELECT NULL, f.store_id, f.direction, coalesce((SELECT c.leased FROM counted c
    WHERE c.store_id = f.store_id AND c.direction = f.direction), f.leased)::float8 FROM free f
"""  # noqa: S608 - pieces of this file


class Seen(NamedTuple):
    """What statements that grant have told so far: ends of tickets written, ends of leases by ticket and store, leases that stores
    hold by (store, direction), and tickets of projects at their limits."""

    ends: dict[str, float]
    leases: dict[str, dict[int, float]]
    held: dict[tuple[int, str], int]
    over_limit: set[str]

    def take(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take over the answer of one statement."""
        for id, store_id, direction, at in rows:
            if store_id is None:
                self.ends[id] = at
            elif id is None:
                self.held[store_id, direction] = int(at)
            elif at is None:
                self.over_limit.add(id)
            else:
                self.leases.setdefault(id, {})[store_id] = at


async def grant(connection: Any, requests: Sequence[GrantRequest], seen: Seen) -> None:
    """Grant leases to those of `requests` whose turn it is; what came of it goes to `seen`. All of them want something."""
    tickets = json_rows([(r.id, *r.ticket, r.needs_lease) for r in requests if r.ticket is not None])
    wants = [(r.id, *want, *r.party) for r in requests for want in r.wants]
    limited = sorted({r.party.project for r in requests if r.party.is_limited})
    if limited:  # a row that is not there cannot be locked
        await connection.execute("INSERT INTO usage (project) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING", limited)
    seen.take(await connection.fetch(_GRANT, DEAD_SECONDS, tickets, json_rows(wants)))


# Stores whose every slot is taken can be anybody's turn only when one is given back: they are left out. $2: the broker that asks.
_DUE = f"""
WITH free AS MATERIALIZED (
    SELECT store_id, direction, slots, leased FROM slots
    WHERE (slots IS NULL OR leased < slots)
      AND store_id IN (SELECT unnest(store_ids) FROM waits WHERE desk = $2)
), contender AS MATERIALIZED ({_WAITING}), {_PLACED}
SELECT p.id::text, p.store_id FROM placed p JOIN free f USING (store_id, direction)
WHERE p.desk = $2 AND (f.slots IS NULL OR p.place <= f.slots - f.leased) ORDER BY p.asked_at, p.id
"""  # noqa: S608 - pieces of this file


async def due(db: Any, desk: Any) -> dict[str, list[int]]:
    """The requests that wait at this broker and whose turn it is, with the stores that have a slot for them; first come, first."""
    with reachable():
        rows = await db.fetch(_DUE, DEAD_SECONDS, desk)
    found: dict[str, list[int]] = {}
    for id, store_id in rows:
        found.setdefault(id, []).append(store_id)
    return found


_MOST_SEEN = 1000

_LINES = """
SELECT s.store_id, s.slots, s.ended, s.lasted_seconds, s.expected_seconds,
       ARRAY(SELECT (l.project, l.priority, extract(epoch FROM clock_timestamp() - l.granted_at)::float8,
                     extract(epoch FROM coalesce(l.expected_at, l.expires_at) - l.granted_at)::float8)
             FROM leases l WHERE l.store_id = s.store_id AND l.direction = s.direction AND l.expires_at > clock_timestamp() LIMIT $4),
       ARRAY(SELECT (w.id::text, w.project, w.priority, w.weight, extract(epoch FROM w.asked_at)::float8)
             FROM waits w JOIN desks d ON d.id = w.desk
             WHERE s.store_id = ANY (w.store_ids) AND w.direction = s.direction
               AND d.seen_at > clock_timestamp() - make_interval(secs => $3) LIMIT $4)
FROM slots s WHERE s.store_id = ANY ($1::int[]) AND s.direction = $2 AND s.slots IS NOT NULL
"""


async def lines(db: Any, store_ids: Sequence[int], direction: Direction) -> dict[int, Line]:
    """What is under way on stores with slots, and who waits for them; of either at most 1,000 a store."""
    with reachable():
        rows = await db.fetch(_LINES, list(store_ids), direction.value, DEAD_SECONDS, _MOST_SEEN)
    found: dict[int, Line] = {}
    for store_id, slots, ended, lasted, expected, under_way, contenders in rows:
        held: dict[Party, int] = {}
        for project, priority, _, _ in under_way:
            held[project, priority] = held.get((project, priority), 0) + 1
        found[store_id] = Line(
            slots,
            [Under(held_for, expected_for) for _, _, held_for, expected_for in under_way],
            [Contender(*contender) for contender in contenders],
            held,
            pace=lasted / expected if ended and expected > 0 else 1.0,
            mean_seconds=lasted / ended if ended else None,
        )
    return found
