"""Invariant 11: kill -9 of the broker in the middle of twenty uploads, then a restart on the same database.

What was acknowledged is there and right. Every other upload is resumed by its client, or reaped after its end: then no lease, no
reservation and no byte of it is left at either store.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import pytest

from broker.catalog import connect
from tests.parts.broker import Api, BrokerProcess, Reply, serve
from tests.parts.cluster import Brokers, brokers_on, digests, disk_of, disk_store, fetch, ok, register, s3_client, s3_store, said, send
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart

MEBIBYTE = 1 << 20
PART = 5 * MEBIBYTE
UPLOADS = 20
ACKNOWLEDGED_BEFORE_THE_KILL = 5
SETTINGS = f"""
[policy.uploads]
upload_ttl_seconds = 600
url_ttl_seconds = 60
part_url_ttl_seconds = 60
single_put_limit = {MEBIBYTE}
min_part_size = {PART}
[policy.admission]
min_lease_seconds = 3
max_lease_seconds = 3
"""


@dataclass
class Uploader:
    """A client that knows what it was told. It tries again until it has an answer, unless it gives up."""

    api: Api
    session: aiohttp.ClientSession
    number: int
    content: bytes
    store: str
    key: str = field(default_factory=lambda: uuid4().hex)
    ticket: str | None = None
    acknowledged: dict[str, Any] | None = None

    async def run(self) -> None:
        """Upload. Raises `aiohttp.ClientError` when the broker dies."""
        request = {
            "operation": "upload", "image": {"name": f"image-{self.number}"}, "size": len(self.content),
            "digests": digests(self.content), "only": [self.store],
        }  # fmt: skip
        reply = await self.post("/v1/tickets", request, Idempotency_Key=self.key)
        assert reply.status == 201, reply.body
        self.ticket = reply.body["id"]
        if reply.body["state"] == "open":
            (place,) = reply.body["destinations"]
            for part in place.get("parts", [{**place, "offset": 0, "length": len(self.content)}]):
                status = await send(self.session, part, self.content[part["offset"] : part["offset"] + part["length"]])
                assert status in (200, 201, 409, 412), status  # the last two: it is there already
        done = await self.post(f"/v1/tickets/{self.ticket}/commit", self.commit)
        assert done.status == 200, done.body
        self.acknowledged = done.body

    @property
    def commit(self) -> dict[str, Any]:
        """What was sent; of parts the store may know their digests only."""
        if len(self.content) <= MEBIBYTE:
            return said(self.content)
        bodies = [self.content[begin : begin + PART] for begin in range(0, len(self.content), PART)]
        return {**said(self.content), "parts": [{"number": n, **said(body)} for n, body in enumerate(bodies, 1)]}

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        while (reply := await self.api.post(path, body, **headers)).status in (429, 503):
            await asyncio.sleep(0.2)
        return reply


@dataclass(frozen=True)
class Place:
    """A broker that can be killed and started again, and its two stores."""

    brokers: Brokers
    disk: StoresidePart
    weed: S3Part
    prefix: str
    home: Path

    @property
    def port(self) -> int:
        return int(self.brokers.issuer.rpartition(":")[2])


@pytest.fixture
def place(postgres: Postgres, seaweedfs: S3Part, tmp_path: Path) -> Iterator[Place]:
    with brokers_on(postgres.create(), tmp_path, 1, settings=SETTINGS) as brokers, disk_of(brokers, tmp_path / "disk") as disk:
        prefix = f"kill-{uuid4().hex}/"
        settings = {"bucket": seaweedfs.bucket, "region": seaweedfs.region, "prefix": prefix}
        slots: Any = {"write_slots": UPLOADS, "capacity": 1 << 30}
        asyncio.run(register(brokers, s3_store(brokers, seaweedfs, settings=settings, **slots), disk_store(disk, **slots)))
        yield Place(brokers, disk, seaweedfs, prefix, tmp_path)


def objects(place: Place) -> set[str]:
    """Everything that lies at both stores, unfinished multipart uploads and temporary files included.

    But for the file server's notes of uploads that have ended and of tokens that were used, which hold no byte.
    """
    client = s3_client(place.weed)
    listed = client.list_objects_v2(Bucket=place.weed.bucket, Prefix=place.prefix).get("Contents", ())
    begun = client.list_multipart_uploads(Bucket=place.weed.bucket, Prefix=place.prefix).get("Uploads", ())
    files = {
        str(file.relative_to(place.disk.root))
        for file in place.disk.root.rglob("*")
        if file.is_file() and file.name != "ended" and "used" not in file.parts
    }
    return {entry["Key"].removeprefix(place.prefix) for entry in (*listed, *begun)} | files


async def test_a_broker_killed_during_twenty_uploads(place: Place, tmp_path: Path) -> None:
    """Invariant 11: nothing acknowledged is lost; every other upload goes on where it was, or is reaped whole."""
    db = await connect.connect_one(place.brokers.database)
    async with aiohttp.ClientSession() as session:
        draw = random.Random(11)
        sizes = [draw.randint(11, 12) * MEBIBYTE + number if number % 2 else 100_000 + number for number in range(UPLOADS)]
        crowd = []
        for number, size in enumerate(sizes):
            api, store = place.brokers.api(session, subject=f"u{number}"), ("weed", "disk")[number % 4 // 2]
            crowd.append(Uploader(api, session, number, draw.randbytes(size), store))
        tasks = [asyncio.create_task(uploader.run()) for uploader in crowd]
        while sum(uploader.acknowledged is not None for uploader in crowd) < ACKNOWLEDGED_BEFORE_THE_KILL:
            await asyncio.sleep(0.001)
        os.kill(place.brokers.running[0].pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, aiohttp.ClientError) for result in results), results
        acknowledged = [uploader for uploader in crowd if uploader.acknowledged is not None]
        cut_off = [uploader for uploader in crowd if uploader.acknowledged is None]
        assert len(acknowledged) >= ACKNOWLEDGED_BEFORE_THE_KILL and len(cut_off) >= 6
        states = {row["state"]: row["count"] for row in await db.fetch("SELECT state, count(*) FROM uploads GROUP BY state")}
        with serve(place.brokers.database, place.home, settings=SETTINGS, port=place.port) as again:
            await after_the_restart(place, again, db, session, acknowledged, cut_off)
            print(f"\nkill -9 during {UPLOADS} uploads ({states} in the catalogue): {len(acknowledged)} acknowledged, all there and right;")
            print(
                f"of {len(cut_off)} others {len(cut_off[::2])} resumed, {len(cut_off[1::2])} reaped; no lease, reservation or byte is left"
            )
    await db.close()


async def after_the_restart(
    place: Place, again: BrokerProcess, db: asyncpg.Connection[asyncpg.Record], session: aiohttp.ClientSession,
    acknowledged: list[Uploader], cut_off: list[Uploader],
) -> None:  # fmt: skip
    """Every second client that was cut off goes on; the others never come back."""
    # A commit that was under way is taken over when its broker was silent for 20 s; that is not waited for.
    await db.execute("UPDATE uploads SET touched_at = touched_at - interval '1 minute' WHERE state = 'committing'")
    await verify(session, acknowledged)
    resumed = cut_off[::2]
    await asyncio.gather(*(uploader.run() for uploader in resumed))
    await verify(session, resumed)
    kept = {uploader.acknowledged["replica"]["key"] for uploader in (*acknowledged, *resumed) if uploader.acknowledged}
    # A commit may have been done when its answer was cut off: such an upload is an image like any other.
    unheard = await db.fetch(
        "SELECT r.key, b.digests ->> 'sha256' AS sha256 FROM replicas r JOIN blobs b ON b.id = r.blob_id WHERE r.key <> ALL($1)", list(kept)
    )
    # The others' time is up.
    await db.execute("UPDATE uploads SET expires_at = now() WHERE state IN ('open', 'committing')")
    known = {hashlib.sha256(uploader.content).hexdigest() for uploader in cut_off[1::2]}
    assert {row["sha256"] for row in unheard} <= known
    kept |= {row["key"] for row in unheard}
    end = time.monotonic() + 150
    while (left := await leftovers(place, db, kept)) and time.monotonic() < end:
        if "uploads" not in left:
            # Places are looked at once more minutes later, for what came late; that is not waited for.
            await db.execute("UPDATE deletions SET due_at = now() WHERE due_at > now() + interval '10 seconds' AND attempts = 0")
        await asyncio.sleep(0.5)
    assert not left
    again_api = Api(again.url, session, place.brokers.token("admin"))
    for name in ("weed", "disk"):
        store = ok(await again_api.get(f"/v1/stores/{name}"))
        assert store["leased_write"] == 0
    taken = await db.fetchval("SELECT sum(taken)::bigint FROM spaces")
    assert taken == await db.fetchval("SELECT sum(b.size)::bigint FROM replicas r JOIN blobs b ON b.id = r.blob_id")
    for uploader in cut_off[1::2]:
        if uploader.ticket is not None:
            state = ok(await uploader.api.get(f"/v1/tickets/{uploader.ticket}"))["state"]
            assert state in ("abandoned", "committed")
    await verify(session, acknowledged)


async def verify(session: aiohttp.ClientSession, uploaders: list[Uploader]) -> None:
    """Each one's image can be had, and is what was sent."""
    for uploader in uploaders:
        assert uploader.acknowledged is not None
        ticket = ok(await uploader.api.post("/v1/tickets", {"operation": "download", "image": uploader.acknowledged["image"]}), 201)
        assert await fetch(session, ticket["sources"][0]) == uploader.content
        again = ok(await uploader.api.post(f"/v1/tickets/{uploader.ticket}/commit", uploader.commit))
        assert again == uploader.acknowledged


async def leftovers(place: Place, db: asyncpg.Connection[asyncpg.Record], kept: set[str]) -> dict[str, Any]:
    """What is there that belongs to nothing."""
    found = await db.fetchrow(
        """SELECT (SELECT count(*) FROM leases)::int AS leases, (SELECT sum(leased) FROM slots)::int AS counted,
                  (SELECT count(*) FROM uploads WHERE state IN ('open', 'committing'))::int AS uploads,
                  (SELECT count(*) FROM deletions)::int AS deletions,
                  (SELECT count(*) FROM images WHERE status <> 'active')::int AS images"""
    )
    assert found is not None
    left: dict[str, Any] = {name: number for name, number in found.items() if number}
    extra = await asyncio.to_thread(objects, place) - kept
    if extra:
        left["objects"] = extra
    return left
