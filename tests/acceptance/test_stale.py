"""The database is gone for a while: downloads from stores without limits go on from memory, everything else says when to come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.parts.broker import Api, Reply, RunningBroker, broker_on
from tests.parts.cluster import SITE, fetch, new_upload, ok, put, sources
from tests.parts.condition import until
from tests.parts.postgres import Postgres
from tests.parts.seaweedfs import S3Part

CONTENT = b"known" * 100


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that nobody else uses."""
    with Postgres(None) as server:
        yield server


class Place:
    """A broker with a store ``free`` without limits and a store ``counted`` with slots, and an image on both."""

    def __init__(self, broker: RunningBroker, session: aiohttp.ClientSession) -> None:
        self.broker, self.session = broker, session
        self.api = Api(broker.url, session, broker.token())

    async def prepare(self, part: S3Part, prefix: str) -> Place:
        admin = self.api.as_(self.broker.token("admin"))
        ok(await admin.post("/v1/sites", {"path": SITE}), 201)
        for name, slots in (("free", None), ("counted", 10)):
            settings = {"bucket": part.bucket, "region": part.region, "prefix": f"{prefix}-{name}/"}
            store = {"name": name, "kind": "s3", "site": SITE, "endpoint": part.endpoint, "settings": settings, "internal": True}
            store |= {"credential": self.broker.credential(name, part.credential), "read_slots": slots}
            ok(await admin.post("/v1/stores", store), 201)
        self.both = (await put(self.api, self.session, CONTENT, "free", "counted"))["image"]
        self.counted = (await put(self.api, self.session, CONTENT[::-1], "counted"))["image"]
        self.cold = (await put(self.api, self.session, CONTENT[1:], "free"))["image"]
        for image in (self.both, self.counted):
            ok(await self.download(image), 201)
        return self

    async def download(self, image: str, **fields: Any) -> Reply:
        return await self.api.post("/v1/tickets", {"operation": "download", "image": image, **fields})


@pytest.fixture
async def place(server: Postgres, seaweedfs: S3Part, session: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Place]:
    async with broker_on(server.create(), tmp_path, {"database": {"grace_seconds": 120}}) as broker:
        yield await Place(broker, session).prepare(seaweedfs, tmp_path.name)


def refused(reply: Reply) -> None:
    assert reply.status == 503, reply.body
    assert reply.body["type"] == "/problems/unavailable"
    assert int(reply.headers["Retry-After"]) >= 1


async def test_while_the_database_is_gone(place: Place, server: Postgres) -> None:
    server.stop()
    try:
        got = ok(await place.download(place.both, parallel=2), 201)
        assert got["stale"] is True
        assert list(sources(got)) == ["free"], "a store that counts its slots is not offered, not even as a standby"
        assert await fetch(place.session, sources(got)["free"]) == CONTENT
        again = ok(await place.api.post("/v1/tickets", {"operation": "download", "image": place.both}, Idempotency_Key="one"), 201)
        assert again["stale"] is True
        # What is in memory is known to be refused as well; what is not cannot be told from what does not exist.
        stranger = place.api.as_(place.broker.token(project="other"))
        assert (await stranger.post("/v1/tickets", {"operation": "download", "image": place.both})).status == 404
        refused(await place.download(place.counted))
        refused(await place.download(place.cold))
        refused(await place.api.post("/v1/tickets", new_upload(b"new")))
        asked = [{"operation": "download", "image": image} for image in (place.both, place.counted)]
        batch = ok(await place.api.post("/v1/tickets:batch", {"tickets": asked}))["tickets"]
        assert (batch[0]["stale"], batch[1]["status"]) == (True, 503)
        report = {"store": "free", "outcome": "ok", "bytes": 10, "seconds": 0.1}
        for id in (got["id"], again["id"], batch[0]["id"]):
            assert (await place.api.post(f"/v1/tickets/{id}/report", report)).status == 404
            assert (await place.api.post(f"/v1/tickets/{id}/refresh")).status == 404
            assert (await place.api.delete(f"/v1/tickets/{id}")).status == 404
        refused(await place.api.get("/v1/images"))
    finally:
        server.start_again()

    async def recovered() -> bool:
        reply = await place.download(place.both)
        return reply.status == 201 and "stale" not in reply.body

    await until(recovered)
    after = ok(await place.download(place.counted), 201)
    assert (await place.api.post(f"/v1/tickets/{after['id']}/report", {**report, "store": "counted"})).status == 204
    assert (await place.api.get(f"/v1/tickets/{got['id']}")).status == 404, "what was stale is not recorded afterwards"


async def test_after_the_grace(server: Postgres, seaweedfs: S3Part, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """And with none from the beginning."""
    async with broker_on(server.create(), tmp_path, {"database": {"grace_seconds": 0}}) as broker:
        place = await Place(broker, session).prepare(seaweedfs, tmp_path.name)
        server.stop()
        try:
            refused(await place.download(place.both))
        finally:
            server.start_again()
