"""Whoever has written something can wait until every broker that believes its memory has taken it over, and no longer than that."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from broker import metrics
from broker.catalog import brokers, changes
from broker.model import new_id
from broker.service.memory import FRESH_SECONDS, Memory
from broker.service.spread import SPREAD_SECONDS, Spread
from tests.catalog import rows


async def fail(pool: Any, store: int, client: str = "c") -> int:
    """A failure, and the transaction that wrote it."""
    return int(
        await pool.fetchval(
            """INSERT INTO failures VALUES ($1, $2, now() + interval '1 minute')
               ON CONFLICT (client, store_id) DO UPDATE SET until = excluded.until RETURNING pg_current_xact_id()::text""",
            client, store,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("snapshot", "xact", "shown"),
    [
        ("10:10:", 9, True),
        ("10:10:", 10, False),
        ("10:13:", 12, True),
        ("10:13:11", 11, False),
        ("10:13:11", 12, True),
        ("10:15:10,12", 12, False),
        ("10:15:10,12", 1, True),
        ("10:15:10,12", 15, False),
    ],
)
def test_shows(snapshot: str, xact: int, shown: bool) -> None:
    assert brokers.shows(snapshot, xact) is shown


async def test_snapshots_show_what_the_reader_was_told(pool: Any) -> None:
    """Also while an older transaction runs, which holds the reader's position back."""
    store = await rows.store(pool)
    begin = await changes.position(pool)
    async with pool.acquire() as slow:
        transaction = slow.transaction()
        await transaction.start()
        before = (await changes.since(pool, begin)).seen
        running = int(await slow.fetchval("SELECT pg_current_xact_id()::text"))
        xact = await fail(pool, store)
        told = await changes.since(pool, begin)
        assert changes.Change("failure", "c") in told.changes
        assert (brokers.shows(told.seen, xact), brokers.shows(before, xact), brokers.shows(told.seen, running)) == (True, False, False)
        await transaction.rollback()


async def test_a_broker_that_was_not_waited_for_has_to_read_once_more(pool: Any) -> None:
    id = new_id()
    seen = (await changes.since(pool, await changes.position(pool))).seen
    assert [await brokers.note(pool, id, seen, FRESH_SECONDS) for _ in range(2)] == [False, True]
    await pool.execute("UPDATE brokers SET at = at - make_interval(secs => $1)", FRESH_SECONDS)
    assert await brokers.seen(pool, FRESH_SECONDS) == []
    assert [await brokers.note(pool, id, seen, FRESH_SECONDS) for _ in range(2)] == [False, True]
    await pool.execute("UPDATE brokers SET at = at - interval '2 hours'")
    await brokers.forget_dead(pool)
    assert await pool.fetchval("SELECT count(*) FROM brokers") == 0


@pytest.fixture
async def memory(pool: Any) -> Any:
    """A broker's memory, which does not follow the change log by itself."""
    made = Memory(pool, lambda store: None, metrics.create(), time.time)  # type: ignore[arg-type,return-value]
    await made.reload_stores()
    await made.catch_up()
    yield made
    await made.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for comes, however slow the machine."""
    monkeypatch.setattr("broker.service.spread.SPREAD_SECONDS", 60.0)


@pytest.mark.usefixtures("patient")
async def test_a_report_waits_until_every_broker_has_taken_it_over(pool: Any, memory: Memory) -> None:
    store = await rows.store(pool)
    await memory.catch_up()
    spread = Spread(pool, 60.0, metrics.create())
    waiting = asyncio.create_task(spread.wait(await fail(pool, store, "c")))
    other = asyncio.create_task(spread.wait(await fail(pool, store, "d")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert memory.failures("c") == {}
    await memory.catch_up()
    assert await waiting
    assert await other
    assert {client: list(memory.failures(client)) for client in "cd"} == {"c": ["s1"], "d": ["s1"]}
    await spread.close()


@pytest.mark.usefixtures("patient")
async def test_a_broker_that_is_stopped_is_waited_for_no_longer_than_it_believes_its_memory(pool: Any, memory: Memory) -> None:
    store = await rows.store(pool)
    await memory.catch_up()
    spread = Spread(pool, FRESH_SECONDS, metrics.create())
    assert await spread.wait(await fail(pool, store)), "it was not heard of for so long that nobody waits"
    assert SPREAD_SECONDS > FRESH_SECONDS
    assert not memory.is_fresh()
    assert list(await memory.failures_of("c")) == ["s1"], "it believes nothing, and looks it up"
    await spread.close()


async def test_what_there_was_no_room_for_is_looked_up(pool: Any, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.service.conditions.CLIENTS", 2)
    store = await rows.store(pool)
    for client in "abc":
        await fail(pool, store, client)
    await memory.catch_up()
    assert sum(bool(memory.failures(client)) for client in "abc") == 2
    assert all([list(await memory.failures_of(client)) == ["s1"] for client in "abc"])
    assert not await memory.failures_of("d")
    assert memory.failing(time.time()) == {"s1": 2}
    assert memory.failing(time.time() + 61) == {}
