"""What a lost database looks like to the rest of the broker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from broker import errors
from broker.catalog import connect


async def test_json_columns_are_python_values(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    value = {"a": [1, None, "ä"], "b": {"c": 2.5}}
    assert await pool.fetchval("select $1::jsonb", value) == value
    assert await pool.fetchval("select $1::json", value) == value
    assert await pool.fetchval("select $1::jsonb ->> 'a'", {"a": "x"}) == "x"


async def test_sessions_have_their_limits(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    for name, value in connect.SERVER_SETTINGS.items():
        assert (await pool.fetchval("select current_setting($1)", name)).lower() == value.lower()


async def test_an_open_transaction_does_not_outlive_its_borrower(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    connection = await pool.acquire()
    await connection.execute("create table kept (id integer)")
    await connection.execute("begin")
    await connection.execute("insert into kept values (1)")
    await pool.release(connection)
    assert await pool.fetchval("select count(*) from kept") == 0
    assert await pool.fetchval("select count(*) from pg_stat_activity where state like 'idle in transaction%'") == 0


async def test_a_connection_that_is_ended_by_the_server_is_unavailable(pool: asyncpg.Pool[asyncpg.Record], database: str) -> None:
    async with pool.acquire() as connection:
        victim = connection.get_server_pid()
        other = await connect.connect_one(database)
        await other.execute("select pg_terminate_backend($1, 5000)", victim)
        await other.close()
        with pytest.raises(errors.Unavailable) as raised, connect.reachable():
            await connection.fetchval("select 1")
    assert raised.value.retry_after == 1
    assert await pool.fetchval("select 1") == 1, "the pool makes a new one"


@pytest.mark.parametrize(
    ("setting", "sql"),
    [
        ("set statement_timeout = '50ms'", "select pg_sleep(60)"),
        ("set lock_timeout = '50ms'", "lock table held"),
    ],
)
async def test_a_query_that_is_cut_is_unavailable(database: str, setting: str, sql: str) -> None:
    holder, waiter = await connect.connect_one(database), await connect.connect_one(database)
    await holder.execute("create table held (id integer)")
    async with holder.transaction(), waiter.transaction():
        await holder.execute("lock table held")
        await waiter.execute(setting)
        with pytest.raises(errors.Unavailable), connect.reachable():
            await waiter.execute(sql)
        await waiter.execute("rollback; begin")
    await holder.close()
    await waiter.close()


async def test_a_deadlock_is_unavailable(database: str) -> None:
    first, second = await connect.connect_one(database), await connect.connect_one(database)
    await first.execute("create table a (id integer); create table b (id integer)")
    await first.execute("begin; lock table a")
    await second.execute("begin; set local deadlock_timeout = '10ms'; lock table b")
    waiting = asyncio.create_task(first.execute("lock table b"))
    with pytest.raises(errors.Unavailable), connect.reachable():
        await second.execute("lock table a")
    await second.execute("rollback")
    await waiting
    await first.close()
    await second.close()


async def test_nobody_there_is_unavailable_and_says_no_address(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable) as raised:
        await connect.connect(f"postgresql://broker:hunter2@/broker?host={tmp_path}")
    assert str(tmp_path) not in str(raised.value)
    assert "hunter2" not in repr(raised.value.problem())


async def test_a_closed_pool_is_unavailable_but_our_mistakes_are_not(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    with pytest.raises(asyncpg.InterfaceError), connect.reachable():
        await pool.fetchval("select $1::integer", 1, 2)
    with pytest.raises(asyncpg.UndefinedTableError), connect.reachable():
        await pool.fetchval("select 1 from nowhere")
    await pool.close()
    with pytest.raises(errors.Unavailable), connect.reachable():
        await pool.fetchval("select 1")
