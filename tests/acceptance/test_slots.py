"""Slots through the API: a full store refuses, what is given back can be leased again, fewer slots drain first.

That they hold while brokers die is for ``tests/storms/test_leases.py``.
"""

from __future__ import annotations

import aiohttp

from tests.parts.broker import Api
from tests.parts.cluster import Cluster, ok, put, register, s3_store

READ_SLOTS = 5


async def lease_all(apis: list[Api], image: str) -> list[str]:
    """Take tickets from one broker after the other until there is no slot; their ids."""
    taken: list[str] = []
    while (reply := await apis[len(taken) % len(apis)].post("/v1/tickets", {"operation": "download", "image": image})).status == 201:
        taken.append(reply.body["id"])
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) >= 1
    return taken


async def test_fewer_slots_drain_first(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Those that are leased stay, and there are no new ones until fewer are left than that, at either broker."""
    settings = {"bucket": cluster.weed.bucket, "region": cluster.weed.region, "prefix": "draining/"}
    await register(cluster, s3_store(cluster, cluster.weed, "draining", settings=settings, read_slots=READ_SLOTS))
    admin, *apis = (cluster.api(session, "admin"), *[cluster.api(session, subject="drainer", at=at) for at in (0, 1)])
    image = (await put(apis[0], session, b"bytes" * 100, "draining"))["image"]
    taken = await lease_all(apis, image)
    assert len(taken) == READ_SLOTS
    ok(await admin.patch("/v1/stores/draining", {"read_slots": 2}, "*"))
    for left in (4, 3, 2):
        assert (await apis[left % 2].delete(f"/v1/tickets/{taken.pop()}")).status == 204
        assert (await apis[0].post("/v1/tickets", {"operation": "download", "image": image})).status == 429, left
    assert (await apis[1].delete(f"/v1/tickets/{taken.pop()}")).status == 204
    assert len(await lease_all(apis, image)) == 1
