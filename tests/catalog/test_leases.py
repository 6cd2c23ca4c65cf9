"""Invariant 3 at the statement: whoever asks, however many at once, unexpired leases stay within the slots."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from uuid import UUID

import orjson
import pytest

from broker import metrics
from broker.catalog import connect, leases, tickets
from broker.catalog.coalesce import Coalescer
from broker.catalog.leases import GrantRequest, TicketRow, Want
from broker.model import Operation, new_id
from tests.catalog import rows


def ticket(ttl: float = 60.0) -> TicketRow:
    return TicketRow(Operation.DOWNLOAD, "p", "u", "i", "127.0.0.1", None, None, new_id(), 1, orjson.Fragment("[]"), ttl)


def ask(*wants: Want, needs_lease: bool = True, id: UUID | None = None) -> GrantRequest:
    return GrantRequest(str(id or new_id()), ticket(), wants, needs_lease)


async def count(pool: Any, store: int) -> tuple[int, int]:
    """(slots.leased, rows of leases) of a store."""
    row = await pool.fetchrow(
        "SELECT leased, (SELECT count(*) FROM leases WHERE store_id = $1) FROM slots WHERE store_id = $1 AND direction = 'read'", store
    )
    return row[0], row[1]


@pytest.fixture
async def any_pool(any_postgres: str) -> Any:
    pool = await connect.connect(any_postgres, min_size=1, max_size=10)
    yield pool
    pool.terminate()


async def test_a_batch_never_grants_more_than_the_slots(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=3)
    requests = [ask(Want(store, "read", 60)) for _ in range(5)]
    answers = await leases.grant(any_pool, requests)
    assert [grant.created for grant, _ in answers] == [True, True, True, False, False]
    assert answers[0][1] == {(store, "read"): 3}
    assert await count(any_pool, store) == (3, 3)
    assert await tickets.get(any_pool, requests[0].id) is not None
    assert await tickets.get(any_pool, requests[4].id) is None


async def test_a_ticket_that_needs_no_lease_is_written_without(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=0)
    ((with_want, _), (without, _)) = await leases.grant(any_pool, [ask(Want(store, "read", 60), needs_lease=False), ask(needs_lease=False)])
    assert with_want.created and not with_want.leases
    assert without.created and without.expires_at is not None
    ((short, held),) = await leases.grant(any_pool, [ask(needs_lease=False)])  # no want at all: the short statement
    assert short.created and held == {}


async def test_the_same_id_is_written_and_leased_once(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=5)
    id = new_id()
    ((first, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60), id=id)])
    ((again, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60), id=id)])
    assert first.created and not again.created
    assert await count(any_pool, store) == (1, 1)


async def test_an_existing_ticket_gets_more_leases(any_pool: Any) -> None:
    one, two = await rows.store(any_pool, "one", read=1), await rows.store(any_pool, "two", read=1)
    request = ask(Want(one, "read", 60))
    await leases.grant(any_pool, [request])
    ((more, _),) = await leases.grant(any_pool, [GrantRequest(request.id, None, [Want(two, "read", 60), Want(one, "read", 60)], False)])
    assert set(more.leases) == {two}
    assert {lease.store_id for lease in await leases.held(any_pool, request.id)} == {one, two}


async def test_release_gives_back_once(any_pool: Any) -> None:
    one, two = await rows.store(any_pool, "one", read=2), await rows.store(any_pool, "two", read=2)
    request = ask(Want(one, "read", 60), Want(two, "read", 60))
    await leases.grant(any_pool, [request])
    await leases.release(any_pool, [(request.id, one)])
    assert (await count(any_pool, one), await count(any_pool, two)) == ((0, 0), (1, 1))
    await leases.release(any_pool, [(request.id, None), (request.id, one)])
    assert (await count(any_pool, one), await count(any_pool, two)) == ((0, 0), (0, 0))


async def test_an_expired_lease_counts_until_it_is_swept(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=1)
    await leases.grant(any_pool, [ask(Want(store, "read", 0.01))])
    await any_pool.execute("SELECT pg_sleep(0.05)")
    ((refused, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60))])
    assert not refused.created
    assert await leases.sweep(any_pool) == 1
    ((granted, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60))])
    assert granted.created
    assert await leases.sweep(any_pool) == 0


async def test_a_renewed_lease_is_bounded(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=1)
    request = ask(Want(store, "read", 10))
    ((grant, _),) = await leases.grant(any_pool, [request])
    renewed = await leases.renew(any_pool, request.id, store, 100, 3600)
    assert renewed is not None and renewed > grant.leases[store] + 80
    capped = await leases.renew(any_pool, request.id, store, 10_000, 200)
    (held,) = await leases.held(any_pool, request.id)
    assert capped == pytest.approx(held.granted_at + 200, abs=1e-3)
    assert await leases.renew(any_pool, new_id(), store, 100, 3600) is None


async def test_lowered_slots_drain(any_pool: Any) -> None:
    store = await rows.store(any_pool, read=3)
    first = [ask(Want(store, "read", 60)) for _ in range(3)]
    await leases.grant(any_pool, first)
    await any_pool.execute("UPDATE slots SET slots = 1 WHERE store_id = $1", store)
    await leases.release(any_pool, [(first[0].id, None), (first[1].id, None)])
    ((refused, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60))])
    assert not refused.created  # one lease is left, and one slot
    await leases.release(any_pool, [(first[2].id, None)])
    ((granted, _),) = await leases.grant(any_pool, [ask(Want(store, "read", 60))])
    assert granted.created


async def test_a_storm_of_four_brokers_stays_within_the_slots(any_pool: Any) -> None:
    """Grants, releases, sweeps and expiries at once, over several coalescers; an observer reads the leases all the while."""
    stores = [await rows.store(any_pool, f"s{n}", read=n + 1) for n in range(4)]
    limits = {store: n + 1 for n, store in enumerate(stores)}
    brokers = [Coalescer(any_pool, leases.grant, "grant", metrics.create()) for _ in range(4)]
    rng = random.Random(7)
    done = asyncio.Event()
    seen: list[str] = []

    async def observe() -> int:
        looks = 0
        while not done.is_set():
            for store, leased, unexpired in await any_pool.fetch(
                """SELECT s.store_id, leased,
                          (SELECT count(*) FROM leases l WHERE l.store_id = s.store_id AND l.expires_at > clock_timestamp())
                   FROM slots s WHERE direction = 'read'"""
            ):
                if unexpired > limits[store] or leased > limits[store] or unexpired > leased:
                    seen.append(f"store {store}: {unexpired} unexpired, {leased} counted, {limits[store]} slots")
            looks += 1
        return looks

    async def client(broker: Any) -> int:
        granted = 0
        for _ in range(25):
            forgotten = rng.random() < 0.3
            wants = [Want(store, "read", 0.005 if forgotten else 30.0) for store in rng.sample(stores, rng.randint(1, 3))]
            request = ask(*wants)
            ((grant, _),) = await broker([request])
            granted += len(grant.leases)
            if not forgotten:
                await leases.release(any_pool, [(request.id, None)])
            if rng.random() < 0.2:
                await leases.sweep(any_pool)
        return granted

    observer = asyncio.create_task(observe())
    granted = sum(await asyncio.gather(*(client(brokers[n % 4]) for n in range(24))))
    done.set()
    looks = await observer
    for broker in brokers:
        await broker.close()
    assert seen == []
    assert granted > 100 and looks > 10
    for store in stores:
        leased, kept = await count(any_pool, store)
        assert leased == kept
