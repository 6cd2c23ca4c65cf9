"""Invariant 3, with two brokers as processes, one of which is killed in the middle of a storm."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from broker.catalog import connect
from tests.parts.broker import Api
from tests.parts.cluster import Brokers, brokers_on, new_upload, ok, put, register, s3_store
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part

READ_SLOTS, WRITE_SLOTS, LEASE_SECONDS = 5, 3, 2.0
SETTINGS = f"[policy.admission]\nmin_lease_seconds = {LEASE_SECONDS}\nmax_lease_seconds = {LEASE_SECONDS}\nmin_ticket_seconds = 20.0\n"


class Observer:
    """Reads unexpired leases and slots all the time, as one statement sees them; told of no broker, asked by none."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection
        self.looks = 0
        self.most: dict[str, int] = {}
        self.over: list[tuple[str, int, int]] = []

    async def watch(self) -> None:
        while True:
            rows = await self._connection.fetch(
                """SELECT s.direction, s.slots, (SELECT count(*) FROM leases l WHERE l.store_id = s.store_id AND l.direction = s.direction
                                                 AND l.expires_at > clock_timestamp())::int AS held FROM slots s"""
            )
            self.looks += 1
            for direction, slots, held in rows:
                self.most[direction] = max(held, self.most.get(direction, 0))
                if held > slots:
                    self.over.append((direction, held, slots))
            await asyncio.sleep(0)


async def client(brokers: Brokers, session: aiohttp.ClientSession, image: str, seed: int, tally: dict[int, int]) -> None:
    """Takes tickets from either broker, and ends them in every way there is; some are forgotten."""
    draw = random.Random(seed)
    apis = [brokers.api(session, subject=f"client-{seed}", at=at) for at in (0, 1)]
    while True:
        request = (
            new_upload(draw.randbytes(100))
            if draw.random() < 0.4
            else {"operation": "download", "image": image, "parallel": draw.randint(1, 2)}
        )
        try:
            taken = await draw.choice(apis).post("/v1/tickets", request)
            tally[taken.status] = tally.get(taken.status, 0) + 1
            if taken.status != 201:
                assert taken.status in (429, 503), taken.body
                await asyncio.sleep(0.01)
                continue
            id, there = taken.body["id"], draw.choice(apis)
            match draw.randrange(30):
                case 0:
                    pass  # forgotten
                case 1 | 2 | 3:
                    await there.post(f"/v1/tickets/{id}/report", {"store": "weed", "outcome": "ok", "bytes": 1, "seconds": 0.1})
                case 4 | 5 | 6:
                    await there.post(f"/v1/tickets/{id}/refresh")
                    await asyncio.gather(there.delete(f"/v1/tickets/{id}"), apis[0].delete(f"/v1/tickets/{id}"))
                case 7 | 8 | 9:
                    await there.post(f"/v1/tickets/{id}/activate", {"store": "weed"})
                    await there.delete(f"/v1/tickets/{id}")
                case _:
                    await there.delete(f"/v1/tickets/{id}")
        except aiohttp.ClientError:
            tally[0] = tally.get(0, 0) + 1  # the broker is dead
            await asyncio.sleep(0.02)


async def reached(tally: Mapping[int, int], least: Mapping[int, int]) -> None:
    """Wait until each status was answered so often, and some seconds longer: the observer is to see a storm."""
    async with asyncio.timeout(120):
        while any(tally.get(status, 0) < number for status, number in least.items()):
            await asyncio.sleep(0.05)
    await asyncio.sleep(2)


async def lease_all(api: Api, image: str) -> list[str]:
    """Take tickets until there is no slot; their ids."""
    taken: list[str] = []
    while (reply := await api.post("/v1/tickets", {"operation": "download", "image": image})).status == 201:
        taken.append(reply.body["id"])
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) >= 1
    return taken


@pytest.fixture
def brokers(postgres: Postgres, tmp_path: Path) -> Iterator[Brokers]:
    with brokers_on(postgres.create(), tmp_path, 2, settings=SETTINGS) as started:
        yield started


async def test_slots_hold_over_two_brokers_and_the_death_of_one(brokers: Brokers, seaweedfs: S3Part, tmp_path: Path) -> None:
    """Invariant 3: never more leases than slots, at any instant; what the dead broker granted can be leased again; fewer slots drain."""
    settings = {"bucket": seaweedfs.bucket, "region": seaweedfs.region, "prefix": f"{tmp_path.name}/"}
    await register(brokers, s3_store(brokers, seaweedfs, settings=settings, read_slots=READ_SLOTS, write_slots=WRITE_SLOTS))
    connection = await connect.connect_one(brokers.database)
    observer = Observer(connection)
    async with aiohttp.ClientSession() as session:
        admin, survivor = brokers.api(session, "admin", at=1), brokers.api(session, subject="survivor", at=1)
        made = await put(brokers.api(session), session, b"bytes" * 100, "weed")
        image, tally = made["image"], dict[int, int]()
        watching = asyncio.create_task(observer.watch())
        crowd = [asyncio.create_task(client(brokers, session, image, seed, tally)) for seed in range(24)]
        await reached(tally, {201: 50, 429: 10})
        granted_before = tally[201]
        os.kill(brokers.running[0].pid, signal.SIGKILL)
        await reached(tally, {201: granted_before + 50, 0: 1})
        await end(crowd)
        # What nobody gives back ends by itself.
        await asyncio.sleep(LEASE_SECONDS)
        taken = await lease_all(survivor, image)
        assert len(taken) == READ_SLOTS
        watching.cancel()
        assert observer.over == [], observer.over[:5]
        # Fewer slots: those that are leased stay, no new ones until fewer are left than that.
        ok(await admin.patch("/v1/stores/weed", {"read_slots": 2}, "*"))
        for left in (4, 3, 2):
            assert (await survivor.delete(f"/v1/tickets/{taken.pop()}")).status == 204
            assert (await survivor.post("/v1/tickets", {"operation": "download", "image": image})).status == 429, left
        assert (await survivor.delete(f"/v1/tickets/{taken.pop()}")).status == 204
        assert len(await lease_all(survivor, image)) == 1
        await end([watching])
    print(f"{observer.looks} looks, at most {observer.most}, answers {tally}")
    assert observer.most == {"read": READ_SLOTS, "write": WRITE_SLOTS}
    await asyncio.sleep(LEASE_SECONDS)
    await drained(connection)
    await connection.close()


async def drained(connection: Any) -> None:
    """The counts agree with the leases, now and when all have ended."""
    counts = await connection.fetch(
        """SELECT s.leased, (SELECT count(*) FROM leases l WHERE (l.store_id, l.direction) = (s.store_id, s.direction))::int AS rows
           FROM slots s"""
    )
    assert all(row["leased"] == row["rows"] for row in counts)


async def end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks; one that failed fails the test."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            pytest.fail(f"a task failed: {result!r}")
