"""Tickets and reports in partitions: made ahead, dropped when old, never in anybody's way."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from broker.catalog import partitions
from broker.model import new_id

TODAY = date(2030, 6, 15)
_INSERT = """INSERT INTO tickets (id, operation, project, subject, instance, address, blob_id, places, expires_at)
             VALUES ($1, 'download', 'p', 's', '', '127.0.0.1', $1, '[]', now())"""


def at(day: date, hour: int = 12) -> float:
    return datetime(day.year, day.month, day.day, hour, tzinfo=UTC).timestamp()


async def where(db: Any, id: UUID) -> str | None:
    found = await db.fetchval("SELECT tableoid::regclass::text FROM tickets WHERE id = $1", id)
    return None if found is None else str(found)


async def names(db: Any, table: str) -> set[str]:
    rows = await db.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::text::regclass", table)
    return {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("tickets_20300101", date(2030, 1, 1)),
        ("reports_20281231", date(2028, 12, 31)),
        ("tickets_default", None),
        ("leases_20300101", None),
        ("tickets_2030010", None),
    ],
)
def test_names(name: str, day: date | None) -> None:
    assert partitions.day_of(name) == day


def test_ids_of_a_day_are_between_its_first_and_the_next_days() -> None:
    for hour in (0, 23):
        assert partitions.first_id(TODAY) <= new_id(at(TODAY, hour)) < partitions.first_id(TODAY + timedelta(days=1))
    assert new_id(at(TODAY, 0) - 0.001) < partitions.first_id(TODAY)


async def test_days_to_come_are_made_and_used(pool: Any) -> None:
    made, dropped = await partitions.tend(pool, TODAY, 30)
    assert (made, dropped) == (2 * partitions.DAYS_AHEAD, 0)
    assert await partitions.tend(pool, TODAY, 30) == (0, 0)
    assert {"tickets_20300616", "tickets_20300617", "tickets_20300618", "tickets_default"} == await names(pool, "tickets")
    tomorrow, now = new_id(at(TODAY + timedelta(days=1))), new_id(at(TODAY))
    for id in (tomorrow, now):
        await pool.execute(_INSERT, id)
    assert await where(pool, tomorrow) == "tickets_20300616"
    assert await where(pool, now) == "tickets_default"


async def test_what_is_old_goes_and_what_is_kept_stays(pool: Any) -> None:
    await partitions.tend(pool, TODAY, 30)
    day = TODAY + timedelta(days=1)
    first, last = new_id(at(day, 0)), new_id(at(TODAY, 23))
    for id in (first, last):
        await pool.execute(_INSERT, id)
        await pool.execute("INSERT INTO reports (ticket_id, store_id, outcome, bytes, seconds) VALUES ($1, 1, 'ok', 1, 1)", id)
    await partitions.tend(pool, TODAY + timedelta(days=30), 30)  # both are within what is kept
    assert [await where(pool, id) for id in (first, last)] == ["tickets_20300616", "tickets_default"]
    await partitions.tend(pool, TODAY + timedelta(days=31), 30)  # the default one's row is too old by one day
    assert [await where(pool, id) for id in (first, last)] == ["tickets_20300616", None]
    _, dropped = await partitions.tend(pool, TODAY + timedelta(days=32), 30)
    assert dropped == 2
    assert await where(pool, first) is None
    assert await pool.fetchval("SELECT count(*) FROM reports") == 0
    assert "tickets_20300616" not in await names(pool, "tickets")


async def test_a_day_with_rows_in_the_default_partition_is_left_there(pool: Any) -> None:
    early = new_id(at(TODAY + timedelta(days=1)))
    await pool.execute(_INSERT, early)  # from a broker whose clock is a day ahead
    made, _ = await partitions.tend(pool, TODAY, 30)
    assert made == 2 * partitions.DAYS_AHEAD - 1
    assert await where(pool, early) == "tickets_default"


async def test_brokers_at_once_make_each_partition_once(pool: Any) -> None:
    found = await asyncio.gather(*(partitions.tend(pool, TODAY, 30) for _ in range(4)))
    await partitions.tend(pool, TODAY, 30)  # whoever was kept from something leaves it to the next time
    assert sum(made for made, _ in found) <= 2 * partitions.DAYS_AHEAD
    assert len(await names(pool, "tickets")) == partitions.DAYS_AHEAD + 1


async def test_a_transaction_that_holds_a_ticket_is_not_waited_for(pool: Any) -> None:
    await partitions.tend(pool, TODAY, 30)
    async with pool.acquire() as other, other.transaction():
        await other.execute(_INSERT, new_id(at(TODAY + timedelta(days=1))))
        _, first = await partitions.tend(pool, TODAY + timedelta(days=40), 30)
    _, then = await partitions.tend(pool, TODAY + timedelta(days=40), 30)
    assert first < 2 * partitions.DAYS_AHEAD  # reports are nobody's at the moment, tickets are
    assert first + then == 2 * partitions.DAYS_AHEAD
