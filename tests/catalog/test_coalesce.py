"""Coalesced calls: fewer round trips, each caller its own results, errors to those concerned, recovery of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from broker import errors, metrics
from broker.catalog.coalesce import Coalescer


async def test_callers_of_one_turn_share_a_statement(pool: Any) -> None:
    batches: list[list[int]] = []

    async def work(connection: Any, items: Sequence[int]) -> Sequence[int]:
        batches.append(list(items))
        return [await connection.fetchval("SELECT $1::int * 2", item) for item in items]

    double = Coalescer(pool, work, "work", metrics.create())
    answers = await asyncio.gather(*(double([n, n + 100]) for n in range(10)))
    assert [list(answer) for answer in answers] == [[2 * n, 2 * n + 200] for n in range(10)]
    assert len(batches) == 1
    await double.close()


async def test_what_comes_meanwhile_waits_for_the_next_batch_and_batches_are_bounded(pool: Any) -> None:
    sizes: list[int] = []

    async def work(connection: Any, items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        await connection.execute("SELECT pg_sleep(0.01)")
        return items

    same = Coalescer(pool, work, "work", metrics.create(), most=4)
    first = asyncio.create_task(same([0]))
    await asyncio.sleep(0.005)
    rest = [asyncio.create_task(same([n])) for n in range(1, 10)]
    assert [list(await task) for task in (first, *rest)] == [[n] for n in range(10)]
    assert sizes == [1, 4, 4, 1]
    await same.close()


async def test_a_batch_larger_than_the_bound_still_runs(pool: Any) -> None:
    async def work(_: Any, items: Sequence[int]) -> Sequence[int]:
        return items

    same = Coalescer(pool, work, "work", metrics.create(), most=2)
    assert list(await same([1, 2, 3])) == [1, 2, 3]
    await same.close()


async def test_errors_reach_the_callers_and_the_connection_recovers(pool: Any) -> None:
    async def work(connection: Any, items: Sequence[str]) -> Sequence[str]:
        if "kill" in items:
            await pool.execute("SELECT pg_terminate_backend($1)", await connection.fetchval("SELECT pg_backend_pid()"))
        await connection.execute("SELECT 1")
        if "wrong" in items:
            raise ValueError("wrong")
        return items

    run = Coalescer(pool, work, "work", metrics.create())
    with pytest.raises(ValueError, match="wrong"):
        await run(["wrong"])
    with pytest.raises(errors.Unavailable):
        await run(["kill"])
    assert list(await run(["fine"])) == ["fine"]
    await run.close()


async def test_a_cancelled_caller_disturbs_nobody(pool: Any) -> None:
    async def work(connection: Any, items: Sequence[int]) -> Sequence[int]:
        await connection.execute("SELECT pg_sleep(0.02)")
        return items

    run = Coalescer(pool, work, "work", metrics.create())
    one, two = asyncio.create_task(run([1])), asyncio.create_task(run([2]))
    await asyncio.sleep(0.005)
    one.cancel()
    assert list(await two) == [2]
    with pytest.raises(asyncio.CancelledError):
        await one
    await run.close()
