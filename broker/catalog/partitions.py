"""Tickets and reports age out by partition: one a day is made ahead, and one that is older than what is kept is dropped whole.

Rules
- A partition is a range of ids (UUID version 7 begins with the milliseconds of its making), so a day's partition holds the
  tickets made on that day (UTC) and the reports on them. Names say the day: ``tickets_20260131``.
- What no partition fits (the first day, a clock far off) goes to the default one; a day that has rows there gets no partition
  any more, and its rows are deleted one by one when they are old.
- Nobody waits for this: a lock that is not there within `LOCK_MILLISECONDS` is tried again next time. One broker at a time.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from broker import errors
from broker.catalog.connect import reachable
from broker.catalog.transaction import transaction

TABLES = {"tickets": "id", "reports": "ticket_id"}
"""What is kept in partitions, and by which column."""

DAYS_AHEAD = 3
LOCK_MILLISECONDS = 500
_LOCK = 0x7061_7274  # any number that no other advisory lock uses
_BATCH = 10_000
_log = structlog.get_logger(__name__)


def first_id(day: date) -> UUID:
    """The least id that can be made on a day."""
    return UUID(int=int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000) << 80)


def day_of(name: str) -> date | None:
    """The day of a partition's name; ``None`` for other tables."""
    table, _, digits = name.rpartition("_")
    if table not in TABLES or len(digits) != 8 or not digits.isdecimal():
        return None
    return datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC).date()


async def tend(db: Any, today: date, keep_days: int) -> tuple[int, int]:
    """Make the partitions of the days to come, and forget what is older than `keep_days`. How many were made, how many dropped.

    What could not be locked now is left to the next time.
    """
    made = dropped = 0
    oldest = today - timedelta(days=keep_days)
    for table, column in TABLES.items():
        present = await _days(db, table)
        for day in (today + timedelta(days=ahead) for ahead in range(1, DAYS_AHEAD + 1)):
            if day not in present:
                made += await _unless_locked(_make, db, table, column, day)
        for day in present:
            if day < oldest:
                dropped += await _unless_locked(_drop, db, table, day)
        await _empty_default(db, table, column, first_id(oldest))
    return made, dropped


async def _days(db: Any, table: str) -> set[date]:
    with reachable():
        rows = await db.fetch(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = $1::text::regclass", table
        )
    return {day for row in rows if (day := day_of(row["relname"])) is not None}


async def _unless_locked(change: Any, *arguments: Any) -> bool:
    """Whether the change was made; not when a lock or somebody else's work was in the way."""
    try:
        return bool(await change(*arguments))
    except errors.Unavailable as error:
        if not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
            raise
    except (asyncpg.DuplicateTableError, asyncpg.UndefinedTableError, asyncpg.CheckViolationError):
        pass  # another broker was faster, or a row for that day has just come to the default partition
    _log.info("partition left for the next time", table=arguments[1], change=change.__name__.strip("_"))
    return False


async def _make(db: Any, table: str, column: str, day: date) -> bool:
    """A table like the others first, attached then: that locks the parent the least, and the default one only to look through it."""
    name = f"{table}_{day:%Y%m%d}"
    begin, end = first_id(day), first_id(day + timedelta(days=1))
    async with transaction(db) as connection:
        await _one_at_a_time(connection)
        if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table}_default WHERE {column} >= $1 AND {column} < $2)", begin, end):  # noqa: S608
            return False
        await connection.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)")
        await connection.execute(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')")
    return True


async def _drop(db: Any, table: str, day: date) -> bool:
    async with transaction(db) as connection:
        await _one_at_a_time(connection)
        await connection.execute(f"DROP TABLE {table}_{day:%Y%m%d}")
    return True


async def _one_at_a_time(connection: Any) -> None:
    await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)


async def _empty_default(db: Any, table: str, column: str, before: UUID) -> None:
    """Delete what is old among the rows that no partition fitted, some at a time."""
    deleted = _BATCH
    while deleted == _BATCH:
        with reachable():
            deleted = await db.fetchval(
                f"WITH gone AS (DELETE FROM {table}_default WHERE {column} IN (SELECT {column} FROM {table}_default "  # noqa: S608
                f"WHERE {column} < $1 LIMIT {_BATCH}) RETURNING 1) SELECT count(*) FROM gone",
                before,
            )
