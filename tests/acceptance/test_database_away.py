"""Bad input: the database goes away in the middle of requests: 503 with Retry-After, nothing half done, and it recovers by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from broker.catalog import connect
from tests.parts.broker import Api, Reply
from tests.parts.cluster import Brokers, brokers_on, ok, put, register, s3_store
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A PostgreSQL that nobody else uses."""
    with Postgres(None) as server:
        yield server


@pytest.fixture
def brokers(server: Postgres, seaweedfs: S3Part, tmp_path: Path) -> Iterator[Brokers]:
    with brokers_on(server.create(), tmp_path, 2) as brokers:
        settings = {"bucket": seaweedfs.bucket, "region": seaweedfs.region, "prefix": f"{tmp_path.name}/"}
        store = s3_store(brokers, seaweedfs, settings=settings, read_slots=1000, write_slots=1000)
        asyncio.run(register(brokers, store))
        yield brokers


class Storm:
    """Clients that post until they are answered; each request has a key, each refusal must be one that may be repeated."""

    def __init__(self, apis: list[Api], image: str) -> None:
        self.apis = apis
        self.image = image
        self.refused = 0
        self.made: dict[str, list[str]] = {"images": [], "tickets": []}
        self.going = True

    async def client(self, number: int) -> None:
        while self.going:
            key = uuid4().hex
            if number % 2:
                self.made["images"].append((await self.insist("/v1/images", {"name": f"storm-{key}"}, key, 201)).body["id"])
            else:
                asked = {"operation": "download", "image": self.image}
                id = (await self.insist("/v1/tickets", asked, key, 201)).body["id"]
                self.made["tickets"].append(id)
                if number % 4:
                    report = {"store": "weed", "outcome": "ok", "bytes": 10, "seconds": 0.1}
                    await self.insist(f"/v1/tickets/{id}/report", report, uuid4().hex, 204)

    async def insist(self, path: str, body: Any, key: str, status: int) -> Reply:
        for attempt in range(400):
            reply = await self.apis[attempt % 2].post(path, body, Idempotency_Key=key)
            if reply.status == status:
                return reply
            assert reply.status == 503, reply.body
            assert reply.body["type"] == "/problems/unavailable"
            assert int(reply.headers["Retry-After"]) >= 1
            self.refused += 1
            await asyncio.sleep(0.05)
        pytest.fail("the database did not come back")


async def test_a_database_that_goes_away_in_mid_request(brokers: Brokers, server: Postgres) -> None:
    """Connections are ended, then the server is killed: every answer is right or a 503, and each key stands for one thing."""
    async with aiohttp.ClientSession() as session:
        apis = [brokers.api(session, at=at) for at in (0, 1)]
        made = await put(apis[0], session, b"bytes" * 100, "weed")
        storm = Storm(apis, made["image"])
        clients = [asyncio.create_task(storm.client(number)) for number in range(16)]
        for _ in range(3):
            await asyncio.sleep(0.4)
            await asyncio.to_thread(server.end_connections, brokers.database)
        await asyncio.sleep(0.4)
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.sleep(1.5)
        await until(lambda: storm.refused > 0, "nothing was refused")
        storm.going = False
        await asyncio.wait_for(asyncio.gather(*clients), 120)
        for broker in brokers.running:
            os.kill(broker.pid, 0)  # the same processes all along
            async with session.get(f"{broker.metrics_url}/healthz") as response:
                assert response.status == 200
        db = await connect.connect_one(brokers.database)
        names = await db.fetch("SELECT name, count(*) FROM images WHERE name LIKE 'storm-%' GROUP BY name")
        assert all(row["count"] == 1 for row in names)
        for table, ids in storm.made.items():
            assert len(ids) == len(set(ids)) > 0
            assert await db.fetchval(f"SELECT count(*) FROM {table} WHERE id::text = ANY($1)", ids) == len(ids), table
        assert await db.fetchval("SELECT count(*) FROM tickets WHERE operation = 'download'") == len(storm.made["tickets"])
        slots = await db.fetch(
            """SELECT s.leased, (SELECT count(*) FROM leases l WHERE (l.store_id, l.direction) = (s.store_id, s.direction)) AS rows
               FROM slots s"""
        )
        assert all(row["leased"] == row["rows"] for row in slots)
        await db.close()
        ok(await apis[1].get("/v1/images"))
        print(f"\n{len(storm.made['images'])} images, {len(storm.made['tickets'])} tickets, {storm.refused} times 503")
