"""Which broker processes there are, and what each has seen of the change log (schemas/sql: brokers).

Rules
- A broker notes the snapshot with which it read the log, after it has taken over everything in it. So whoever has written something
  can tell when every broker knows.
- A broker that has not noted anything for as long as it believes its memory is not waited for, since it believes nothing then. It
  becomes believing again only by reading the log *after* it has noted itself: `note` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from broker.catalog.connect import reachable

_FORGOTTEN_SECONDS = 3600.0

# Nothing is lost with this row when the server crashes, so no disk is waited for.
_NOTE = """
WITH before AS MATERIALIZED (SELECT at FROM brokers WHERE id = $1),
     quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO brokers AS b (id, seen, at) SELECT $1, $2::text::pg_snapshot, clock_timestamp() FROM quick
ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, at = excluded.at
RETURNING (SELECT at FROM before) > clock_timestamp() - make_interval(secs => $3)
"""


async def note(db: Any, id: UUID, seen: str, fresh_seconds: float) -> bool:
    """Note what this broker has seen. False when others did not wait for it just now: then it must read the log once more."""
    with reachable():
        return bool(await db.fetchval(_NOTE, id, seen, fresh_seconds))


async def seen(db: Any, fresh_seconds: float) -> Sequence[str]:
    """The snapshots of all brokers that may believe their memory."""
    with reachable():
        rows = await db.fetch("SELECT seen::text FROM brokers WHERE at > clock_timestamp() - make_interval(secs => $1)", fresh_seconds)
    return [row[0] for row in rows]


def shows(snapshot: str, xact: int) -> bool:
    """Whether a transaction that has committed is visible in a snapshot (PostgreSQL, 9.28.9: ``xmin:xmax:xip_list``)."""
    xmin, xmax, under_way = snapshot.split(":")
    return xact < int(xmin) or (xact < int(xmax) and str(xact) not in under_way.split(","))


async def forget(db: Any, id: UUID) -> None:
    """This broker ends."""
    with reachable():
        await db.execute("DELETE FROM brokers WHERE id = $1", id)


async def forget_dead(db: Any) -> None:
    """Forget brokers that have not noted anything for an hour."""
    with reachable():
        await db.execute("DELETE FROM brokers WHERE at < now() - make_interval(secs => $1)", _FORGOTTEN_SECONDS)
