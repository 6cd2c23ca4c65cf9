"""Copies that are asked for and made by agents; what is cached, and how it leaves the cache. Two stores on one file server."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import pytest

from broker.catalog import copies as copy_catalog
from broker.client import copies
from broker.client.answers import Copy
from broker.client.api import Broker
from broker.model import Client, Principal, Role
from broker.service import cache, reap
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import Api, RunningBroker, broker_on
from tests.parts.cluster import new_upload, ok, said, send


class World:
    """A broker with the stores ``disk`` and ``near``, a cache; who asks, and an image on ``disk``."""

    def __init__(self, broker: RunningBroker, session: aiohttp.ClientSession) -> None:
        self.broker, self.session = broker, session
        self.admin, self.member, self.service = (self.api(role) for role in (Role.ADMIN, Role.MEMBER, Role.SERVICE))
        self.other = self.api(Role.MEMBER, "other")
        self.caretaker = Client(Principal("root", "ops", Role.ADMIN, 2e9), "i", "127.0.0.1", None)

    def api(self, role: Role, project: str = "demo") -> Api:
        return Api(self.broker.url, self.session, self.broker.token(role, project, role.value))

    async def image(self) -> dict[str, Any]:
        content = secrets.token_bytes(3000)
        ticket = ok(await self.member.post("/v1/tickets", {**new_upload(content), "only": ["disk"]}), 201)
        assert await send(self.session, ticket["destinations"][0], content) == 201
        done: dict[str, Any] = ok(await self.member.post(f"/v1/tickets/{ticket['id']}/commit", said(content)))
        return done

    def agent(self) -> Broker:
        return Broker(self.broker.url, self.broker.token(Role.SERVICE, "ops"), patience=5)

    async def replicas(self, blob: str) -> dict[str, str]:
        found = ok(await self.admin.get(f"/v1/blobs/{blob}/replicas"))["replicas"]
        return {each["store"]: each["purpose"] for each in found if each["state"] == "active"}


@pytest.fixture
async def world(database: str, tmp_path: Path) -> AsyncIterator[World]:
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession() as session:
        world = World(broker, session)
        signer = TokenSigner([generate_key("ES256", 0)], broker.url)
        (tmp_path / "disk").mkdir()
        starting = storeside.start(tmp_path / "disk", audience="disk", signer=signer, keys=f"{broker.url}/.well-known/jwks.json")
        disk = await asyncio.to_thread(starting.__enter__)
        ok(await world.admin.post("/v1/sites", {"path": "eu"}), 201)
        for name, more in (("disk", {}), ("near", {"cache": "yes"})):
            settings = {"audience": "disk", "prefix": f"{name}/", **more}
            spec = {"name": name, "kind": "http", "site": "eu", "endpoint": disk.url, "internal": True, "settings": settings}
            ok(await world.admin.post("/v1/stores", spec), 201)
        yield world
        await asyncio.to_thread(starting.__exit__, None, None, None)


async def test_an_agent_makes_what_was_asked_for(world: World) -> None:
    image = await world.image()
    wanted = {"image": image["image"], "store": "near"}
    for refused, body, status in (
        (world.other, wanted, 404),  # another project's image does not exist
        (world.api(Role.READER), wanted, 403),
        (world.member, {**wanted, "store": "nowhere"}, 404),
        (world.member, {**wanted, "store": "disk"}, 409),  # it is there
        (world.member, {**wanted, "format": "vmdk"}, 404),
        (world.member, {**wanted, "url": "http://evil/"}, 400),
    ):
        assert (await refused.post("/v1/copies", body)).status == status, body
    asked = ok(await world.member.post("/v1/copies", wanted), 201)
    assert asked["state"] == "queued"
    assert ok(await world.member.post("/v1/copies", wanted), 201)["id"] == asked["id"], "asked twice, one copy"
    assert (await world.other.get(f"/v1/copies/{asked['id']}")).status == 404
    assert ok(await world.other.get("/v1/copies"))["copies"] == []
    assert (await world.member.post("/v1/copies:take", {})).status == 403

    async with world.agent() as broker:
        assert await broker.take_copy(["disk"]) is None, "only those to its stores"
        taken = await broker.take_copy(["near"])
        assert taken is not None
        assert await broker.take_copy() is None, "nobody else gets it"
        early = await world.service.post(f"/v1/copies/{asked['id']}/report", {"turn": taken.turn, "outcome": "ok"})
        assert early.status == 409, "its end counts only with a replica"
        done = await copies.make(broker, taken)
    assert done.size == 3000
    ended = ok(await world.member.get(f"/v1/copies/{asked['id']}"))
    assert (ended["state"], ended["bytes"], ended["size"]) == ("done", 3000, 3000)
    assert await world.replicas(image["blob"]["id"]) == {"disk": "origin", "near": "origin"}
    mine = ok(await world.member.get("/v1/replicas?store=near"))["replicas"]
    assert [each["project"] for each in mine] == ["demo"], "who asked for it owns it"
    assert (await world.member.post("/v1/copies", wanted)).status == 409


async def test_a_copy_whose_agent_fell_silent_is_anothers(world: World) -> None:
    image = await world.image()
    asked = ok(await world.member.post("/v1/copies", {"image": image["image"], "store": "near"}), 201)
    report = f"/v1/copies/{asked['id']}/report"
    db: asyncpg.Pool[Any] = world.broker.context.db
    for turn in range(1, copy_catalog.MAX_ATTEMPTS + 1):
        assert ok(await world.service.post("/v1/copies:take", {}))["turn"] == turn
        await db.execute("UPDATE copies SET taken_until = now() - interval '1 second'")
    assert (await world.service.post(report, {"turn": 1, "outcome": "running"})).status == 410, "no more its turn"
    assert (await world.service.post("/v1/copies:take", {})).status == 204, "enough have tried"
    await reap.reap(world.broker.context)
    assert ok(await world.member.get(f"/v1/copies/{asked['id']}"))["state"] == "failed"

    again = ok(await world.member.post("/v1/copies", {"image": image["image"], "store": "near"}), 201)
    taken = ok(await world.service.post("/v1/copies:take", {}))
    assert (taken["id"], taken["turn"]) == (again["id"], 1)
    failed = {"turn": 1, "outcome": "failed", "problem": "no space left"}
    assert ok(await world.service.post(f"/v1/copies/{again['id']}/report", failed))["problem"] == "no space left"
    assert ok(await world.member.delete(f"/v1/copies/{again['id']}"), 204) is None
    await db.execute("UPDATE copies SET updated_at = now() - interval '8 days'")
    await reap.reap(world.broker.context)
    assert ok(await world.member.get("/v1/copies"))["copies"] == []


async def test_an_agent_reports_why_it_failed(world: World) -> None:
    image = await world.image()
    asked = ok(await world.member.post("/v1/copies", {"image": image["image"], "store": "near"}), 201)
    async with world.agent() as broker:
        taken = await broker.take_copy()
        assert taken is not None
        ok(
            await world.admin.send(
                "PATCH", "/v1/stores/near", {"enabled": False}, headers={"If-Match": "*", "Content-Type": "application/json"}
            )
        )
        with pytest.raises(Exception, match=r"."):
            await copies.make(broker, taken)
        assert (await broker.copy(taken.id)).state == "failed"
        (listed,) = [each async for each in broker.copies(state="failed")]
        assert isinstance(listed, Copy)
        assert "NoDestination" in listed.problem
    assert ok(await world.member.get(f"/v1/copies/{asked['id']}"))["state"] == "failed"


async def test_the_cache_is_replicas_of_that_purpose(world: World) -> None:
    context = world.broker.context
    images = [await world.image() for _ in range(2)]
    for each in images:
        await cache.queue(context, world.caretaker, _id(each))
    assert [str(id) for id in (await cache.state(context, world.caretaker)).queued] == [each["image"] for each in images]
    async with world.agent() as broker:
        async for copy in copies.take(broker, [], None):
            await copies.make(broker, copy)
    state = await cache.state(context, world.caretaker)
    assert ([str(each.image) for each in state.cached], state.queued) == ([each["image"] for each in images], [])
    assert {each.size for each in state.cached} == {3000}

    # One over the capacity: the older one goes.
    ok(await world.admin.send("PATCH", "/v1/stores/near", {"capacity": 4000}, headers={"If-Match": "*"}))
    assert await cache.prune(context, world.caretaker) == cache.Pruned(1, 3000)
    assert await cache.prune(context, world.caretaker) == cache.Pruned(0, 0), "what is about to go is not counted"
    assert [str(each.image) for each in (await cache.state(context, world.caretaker)).cached] == [images[1]["image"]]

    # A cached copy that is the last good one stays; one that is wrong is cleaned away.
    origin = images[1]["replica"]["id"]
    await context.db.execute("UPDATE replicas SET state = 'missing' WHERE id = $1", origin)
    assert await cache.clear_cache(context, world.caretaker) == 0
    await context.db.execute(
        "UPDATE replicas SET state = CASE purpose WHEN 'cache' THEN 'corrupt' ELSE 'active' END WHERE state <> 'deleting'"
    )
    assert await cache.clean(context, world.caretaker) == 1
    await reap.reap(context)
    assert await world.replicas(images[1]["blob"]["id"]) == {"disk": "origin"}

    await cache.queue(context, world.caretaker, _id(images[1]))
    assert await cache.clear_queue(context) == 1
    await cache.queue(context, world.caretaker, _id(images[1]))
    await cache.remove(context, world.caretaker, _id(images[1]))
    assert await cache.state(context, world.caretaker) == cache.CacheState([], [])


def _id(image: dict[str, Any]) -> UUID:
    return UUID(image["image"])
