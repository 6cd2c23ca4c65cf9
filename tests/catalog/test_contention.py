"""Fairness and limits at the statement: the SQL decides as `broker.turns` does, who waits is left a slot, and quotas are exact."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest

from broker.catalog import connect, contention, leases, quotas, waits
from broker.catalog.leases import GrantRequest, Party, TicketRow, Want
from broker.catalog.quotas import Quota
from broker.catalog.waits import Wait
from broker.model import Direction, Operation, new_id
from broker.turns import Contender, order
from tests.catalog import rows


def ask(party: Party, *stores: int, id: str | None = None, bytes: int = 0) -> GrantRequest:
    """A new ticket's request for a lease on each of `stores`."""
    ticket = TicketRow(Operation.DOWNLOAD, party.project, "u", "i", "127.0.0.1", None, None, new_id(), 1, orjson.Fragment("[]"), 60.0)
    return GrantRequest(id or str(new_id()), ticket, [Want(store, "read", 60, 30, bytes) for store in stores], True, party)


async def grant(db: Any, *requests: GrantRequest) -> list[bool]:
    """Which of them were granted."""
    return [bool(answer.leases) for answer, _ in await leases.grant(db, requests)]


async def wait(db: Any, desk: UUID, *entries: tuple[Party, Sequence[int]]) -> list[str]:
    """Let requests wait, one after the other; their ids."""
    ids = []
    for party, stores in entries:
        ids.append(str(new_id()))
        await waits.tend(db, desk, [Wait(ids[-1], party, Direction.READ, stores, 0)], [])
    return ids


A, B, C = Party("a"), Party("b"), Party("c")


@pytest.fixture
async def any_pool(any_postgres: str) -> Any:
    pool = await connect.connect(any_postgres, min_size=1, max_size=10)
    yield pool
    pool.terminate()


async def test_a_statement_shares_what_is_free_among_projects(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=4)
    assert await grant(any_pool, *[ask(A, store) for _ in range(5)], ask(B, store), ask(C, store)) == [True, True, *[False] * 3, True, True]


async def test_who_waits_is_left_the_slot_by_newcomers(any_pool: Any) -> None:
    store, desk = await rows.store(any_pool, read=1), uuid4()
    (first,) = [ask(A, store)]
    assert await grant(any_pool, first) == [True]
    waiting, later = await wait(any_pool, desk, (B, [store]), (B, [store]))
    assert await contention.due(any_pool, desk) == {}
    await leases.release(any_pool, [(UUID(first.id), None)])
    assert await contention.due(any_pool, desk) == {waiting: [store]}
    assert await grant(any_pool, ask(B, store)) == [False]
    assert await grant(any_pool, ask(B, store, id=later)) == [False]
    assert await grant(any_pool, ask(B, store), ask(B, store, id=waiting)) == [False, True]
    # Its row counts no more, whenever it is removed.
    await any_pool.execute("UPDATE slots SET slots = 2 WHERE store_id = $1", store)
    assert await contention.due(any_pool, desk) == {later: [store]}


async def test_a_broker_that_is_not_seen_has_nobody_waiting(any_pool: Any) -> None:
    store, dead = await rows.store(any_pool, read=1), uuid4()
    await wait(any_pool, dead, (A, [store]))
    assert await grant(any_pool, ask(A, store)) == [False]
    await any_pool.execute("UPDATE desks SET seen_at = seen_at - interval '2.1 s'")
    assert await grant(any_pool, ask(A, store)) == [True]
    await any_pool.execute("UPDATE desks SET seen_at = seen_at - interval '120 s'")
    await waits.sweep(any_pool)
    assert await any_pool.fetchval("SELECT (SELECT count(*) FROM waits) + (SELECT count(*) FROM desks)") == 0


async def test_who_waits_at_another_broker_by_the_same_id_keeps_its_place(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=1)
    first, then = uuid4(), uuid4()
    id, _ = await wait(any_pool, first, (A, [store]), (A, [store]))
    await waits.tend(any_pool, then, [Wait(id, A, Direction.READ, [store], 0)], [])
    await waits.tend(any_pool, first, [], [id])  # the broker that it left removes only what is its own
    assert await contention.due(any_pool, then) == {id: [store]}


async def test_lowered_slots_keep_those_who_wait_waiting(any_pool: Any) -> None:
    store, desk = await rows.store(any_pool, read=3), uuid4()
    held = [ask(A, store) for _ in range(3)]
    assert all(await grant(any_pool, *held))
    (id,) = await wait(any_pool, desk, (B, [store]))
    await any_pool.execute("UPDATE slots SET slots = 1 WHERE store_id = $1", store)
    for request in held:
        assert await contention.due(any_pool, desk) == {}
        await leases.release(any_pool, [(UUID(request.id), None)])
    assert await contention.due(any_pool, desk) == {id: [store]}


async def test_the_sql_decides_as_the_pure_function(any_pool: Any) -> None:
    """Random leases and random waits over three stores and two brokers: the same requests are due."""
    draw = random.Random(11)
    for _ in range(25):
        await any_pool.execute("DELETE FROM waits; DELETE FROM desks; DELETE FROM stores")
        slots = [draw.randint(1, 9) for _ in range(3)]
        stores = [await rows.store(any_pool, f"s{n}", read=count) for n, count in enumerate(slots)]
        parties = [Party(name, priority, priority * draw.choice((0.5, 1.0, 3.0))) for name in "abcd" for priority in (1.0, 4.0)]
        desks = [uuid4(), uuid4()]
        held: list[dict[tuple[str, float], int]] = [{}, {}, {}]
        for index, store in enumerate(stores):
            for _ in range(draw.randint(0, slots[index])):
                party = draw.choice(parties[:5])
                if all(await grant(any_pool, ask(party, store))):
                    held[index][party.project, party.priority] = held[index].get((party.project, party.priority), 0) + 1
        waiting: list[tuple[Contender, set[int], UUID]] = []
        entries: dict[UUID, list[Wait]] = {desk: [] for desk in desks}
        for n in range(draw.randint(0, 25)):
            party, at, desk = draw.choice(parties), draw.sample(range(3), draw.randint(1, 3)), draw.choice(desks)
            id = str(new_id())
            entries[desk].append(Wait(id, party, Direction.READ, [stores[i] for i in at], 0))
            waiting.append((Contender(id, party.project, party.priority, party.weight, float(n // 2)), set(at), desk))
        for desk in desks:
            await waits.tend(any_pool, desk, entries[desk], [])
        asked = [(contender.id, contender.asked_at) for contender, _, _ in waiting]
        await any_pool.executemany("UPDATE waits SET asked_at = to_timestamp($2) WHERE id = $1", asked)
        for desk in desks:
            expected: dict[str, set[int]] = {}
            for index, store in enumerate(stores):
                free = slots[index] - sum(held[index].values())
                placed = order([contender for contender, at, _ in waiting if index in at], held[index])
                for contender in placed[:free]:
                    if any(contender is other and whose == desk for other, _, whose in waiting):
                        expected.setdefault(contender.id, set()).add(store)
            assert {id: set(found) for id, found in (await contention.due(any_pool, desk)).items()} == expected


async def test_limits_hold_on_every_store_and_at_once(any_pool: Any) -> None:
    with_slots, without = await rows.store(any_pool, "one", read=50), await rows.store(any_pool, "two")
    few = Party("few", max_leases=5)
    batches = [[ask(few, draw) for draw in (with_slots, without, without)] for _ in range(6)]
    granted = await asyncio.gather(*(grant(any_pool, *batch) for batch in batches))
    assert sum(map(sum, granted)) == 5
    assert await any_pool.fetchrow("SELECT leases, bytes FROM usage WHERE project = 'few'") == (5, 0)
    ((refused, _),) = await leases.grant(any_pool, [ask(few, without)])
    assert refused.over_limit
    assert not refused.created
    assert await grant(any_pool, ask(Party("other", max_leases=1), without)) == [True]
    first = next(request for batch, answers in zip(batches, granted, strict=True) for request, ok in zip(batch, answers, strict=True) if ok)
    await leases.release(any_pool, [(UUID(first.id), None)])
    assert await grant(any_pool, ask(few, without), ask(few, without)) == [True, False]


async def test_what_a_full_store_refuses_is_not_counted_against_the_limit(any_pool: Any) -> None:
    full, free = await rows.store(any_pool, read=1), await rows.store(any_pool, "free", read=9)
    assert await grant(any_pool, ask(B, full)) == [True]
    limited = Party("a", max_leases=2, max_bytes=20)
    asked = [*[ask(limited, full, bytes=10) for _ in range(5)], *[ask(limited, free, bytes=10) for _ in range(3)]]
    answers = [answer for answer, _ in await leases.grant(any_pool, asked)]
    assert [bool(answer.leases) for answer in answers] == [*[False] * 5, True, True, False]
    assert [answer.over_limit for answer in answers] == [*[False] * 7, True]


async def test_bytes_are_limited_at_the_limit_and_one_past_it(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=9)
    party = Party("few", max_bytes=100)
    assert await grant(any_pool, ask(party, store, bytes=101)) == [False]
    assert await grant(any_pool, ask(party, store, bytes=60)) == [True]
    assert await grant(any_pool, ask(party, store, bytes=41)) == [False]
    assert await grant(any_pool, ask(party, store, bytes=40)) == [True]
    assert await any_pool.fetchrow("SELECT leases, bytes FROM usage WHERE project = 'few'") == (2, 100)
    assert [held.bytes for held in await quotas.held(any_pool, "few")] == [60, 40]
    await any_pool.execute("UPDATE leases SET expires_at = now()")
    assert await leases.sweep(any_pool) == 2
    assert await any_pool.fetchrow("SELECT leases, bytes FROM usage WHERE project = 'few'") == (0, 0)


async def test_a_project_at_its_limit_keeps_no_slot_from_others(any_pool: Any) -> None:
    store, desk = await rows.store(any_pool, read=2), uuid4()
    few = Party("few", max_leases=1)
    assert await grant(any_pool, ask(few, store)) == [True]
    await wait(any_pool, desk, (few, [store]))
    assert await contention.due(any_pool, desk) == {}
    assert await grant(any_pool, ask(A, store)) == [True]


async def test_how_long_leases_lasted_is_told(pool: Any) -> None:
    store = await rows.store(pool, read=3)
    requests = [ask(A, store) for _ in range(3)]
    assert all(await grant(pool, *requests))
    await pool.execute("UPDATE leases SET granted_at = granted_at - interval '15 s', expected_at = granted_at + interval '15 s'")
    line = (await contention.lines(pool, [store], Direction.READ))[store]
    assert (line.slots, line.pace, line.mean_seconds, line.held) == (3, 1.0, None, {("a", 1.0): 3})
    assert [round(under.held_seconds) for under in line.under_way] == [15, 15, 15]
    await leases.release(pool, [(UUID(requests[0].id), None)])
    line = (await contention.lines(pool, [store], Direction.READ))[store]
    assert line.mean_seconds == pytest.approx(15, rel=0.2)
    assert line.pace == pytest.approx(0.5, rel=0.2)  # it was expected to last for 30 s
    await wait(pool, uuid4(), (B, [store]))
    (waiting,) = (await contention.lines(pool, [store], Direction.READ))[store].contenders
    assert (waiting.project, waiting.priority, waiting.weight) == ("b", 1.0, 1.0)


async def test_quotas_are_kept_as_a_whole(pool: Any) -> None:
    await quotas.put(pool, Quota("p", 3, None, 2.0))
    await quotas.put(pool, Quota("p", None, 7, None))
    assert await quotas.get(pool, "p") == Quota("p", None, 7, None)
    assert await quotas.page(pool, limit=9) == await quotas.load(pool) == [Quota("p", None, 7, None)]
    assert await quotas.delete(pool, "p")
    assert not await quotas.delete(pool, "p")
