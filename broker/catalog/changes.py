"""What has changed in the catalogue since a reader last looked (schemas/sql: changes).

Sequence values do not commit in order, so a position is a pair (transaction, id), and it moves only past transactions
older than the oldest one still running. What is visible beyond that is told too, again and again until passed: to forget
something twice is harmless, to forget it late is not (invariant 5).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from broker.catalog.connect import reachable


class Position(NamedTuple):
    """How far a reader has come. Everything of older transactions has been told."""

    xact: int
    id: int


class Change(NamedTuple):
    """Something that memory must forget: a ``blob``, ``image``, ``store``, ``slots``, ``site``, ``quota``, ``key`` or
    ``failure`` (of a client), by its name."""

    kind: str
    subject: str


async def position(db: Any) -> Position:
    """Where a reader begins that will load everything after this call."""
    with reachable():
        return Position(int(await db.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text")), 0)


class Read(NamedTuple):
    """What a reader was told. As many `changes` as the limit means that there are more."""

    changes: list[Change]
    position: Position
    """Where to go on."""
    seen: str
    """The snapshot of this reading, as PostgreSQL writes it: everything visible in it has been told."""


async def since(db: Any, last: Position, limit: int = 10_000) -> Read:
    """The changes after `last`."""
    with reachable():
        rows = await db.fetch(
            """SELECT pg_current_snapshot()::text, c.* FROM (SELECT) AS always LEFT JOIN (
                   SELECT xact::text, id, kind, subject, xact < pg_snapshot_xmin(pg_current_snapshot()) AS passed
                   FROM changes WHERE (xact, id) > ($1::text::xid8, $2) ORDER BY xact, id LIMIT $3) c ON true""",
            str(last.xact), last.id, limit,
        )  # fmt: skip
    seen = rows[0][0]
    found = sorted((row for row in rows if row[1] is not None), key=lambda row: (int(row[1]), row[2]))
    for _, xact, id, _, _, passed in found:
        if not passed:
            break
        last = Position(int(xact), id)
    return Read([Change(row[3], row[4]) for row in found], last, seen)


async def forget_old(db: Any, seconds: float = 3600.0) -> None:
    """Drop entries that every reader has passed. A reader away for longer than `seconds` must load everything anew."""
    with reachable():
        await db.execute("DELETE FROM changes WHERE at < now() - make_interval(secs => $1)", seconds)
