"""M13: a private store is, for everyone but services and administrators, a store that does not exist.

A member asks the same things twice: of an image beside which there is no private store, and of one that has a copy at a private store,
read, written, reported and leased there by others. The answers have to be the same but for ids, instants and signatures; nothing of
the store may be in any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import orjson
import pytest

from broker.model import Role
from broker.sign.token import TokenSigner, generate_key
from tests.parts import storeside
from tests.parts.broker import Api, Reply, RunningBroker, broker_on
from tests.parts.cluster import digests, fetch, new_upload, ok, said, send
from tests.parts.storeside import StoresidePart

HIDDEN = "vault"
"""The private store; the words of its site, its prefix and whoever uses it hold ``covert``."""


@dataclass
class World:
    """A broker with a public store, and later a private one; the member's requests go through `ask`."""

    broker: RunningBroker
    session: aiohttp.ClientSession
    disk: StoresidePart

    def api(self, role: Role, project: str = "demo", subject: str = "alice") -> Api:
        return Api(self.broker.url, self.session, self.broker.token(role, project, subject))

    async def register(self, name: str, **fields: Any) -> None:
        spec = {
            "name": name, "kind": "http", "site": "eu/az1", "endpoint": self.disk.url, "internal": True,
            "settings": {"audience": self.disk.audience, "prefix": f"{name}/"}, **fields,
        }  # fmt: skip
        ok(await self.api(Role.ADMIN).post("/v1/stores", spec), 201)

    async def put(self, api: Api, content: bytes, store: str, **target: Any) -> dict[str, Any]:
        asked = {**new_upload(content), **target, "only": [store]}
        if "blob" in target:
            del asked["image"]
        ticket = ok(await api.post("/v1/tickets", asked), 201)
        assert await send(self.session, ticket["destinations"][0], content) == 201
        done: dict[str, Any] = ok(await api.post(f"/v1/tickets/{ticket['id']}/commit", said(content)))
        return done


@contextlib.asynccontextmanager
async def world_on(database: str, place: Path) -> AsyncIterator[World]:
    """A world on the database with this URL, which keeps its files in `place`."""
    async with broker_on(database, place) as broker, aiohttp.ClientSession() as session:
        signer = TokenSigner([generate_key("ES256", 0)], broker.url)
        objects = place / "disk"
        objects.mkdir()
        starting = storeside.start(objects, audience="disk", signer=signer, keys=f"{broker.url}/.well-known/jwks.json")
        disk = await asyncio.to_thread(starting.__enter__)
        world = World(broker, session, disk)
        for path in ("eu/az1", "eu/az2"):
            ok(await world.api(Role.ADMIN).post("/v1/sites", {"path": path}), 201)
        await world.register("open", read_slots=50, write_slots=50)
        yield world
        await asyncio.to_thread(starting.__exit__, None, None, None)


@pytest.fixture
async def world(database: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world_on(database, tmp_path) as world:
        yield world


@dataclass(frozen=True)
class Things:
    """What the member knows of an image of his, and a replica that he does not know: one at the private store, or none at all."""

    image: str
    blob: str
    replica: str
    other: str
    content: bytes


async def things(world: World) -> Things:
    content = secrets.token_bytes(500)
    done = await world.put(world.api(Role.MEMBER), content, "open")
    return Things(done["image"], done["blob"]["id"], done["replica"]["id"], str(uuid4()), content)


async def hide(world: World, known: Things) -> Things:
    """Give the image a copy at the private store, and let that have been used: leased, reported, failed."""
    service = world.api(Role.SERVICE, "demo", "covert")
    done = await world.put(service, known.content, HIDDEN, blob=known.blob)
    ok(await service.post("/v1/tickets", {"operation": "download", "blob": known.blob, "only": [HIDDEN]}), 201)  # stays open
    for outcome in ("ok", "failed"):
        asked = {"operation": "download", "blob": known.blob, "prefer": [HIDDEN], "parallel": 2}
        ticket = ok(await service.post("/v1/tickets", asked), 201)
        source = next(source for source in ticket["sources"] if source["store"] == HIDDEN)
        assert await fetch(world.session, source) == known.content
        report = {"store": HIDDEN, "outcome": outcome, "bytes": 500, "seconds": 0.5}
        ok(await service.post(f"/v1/tickets/{ticket['id']}/report", report), 204)
    return Things(known.image, known.blob, known.replica, done["replica"]["id"], known.content)


async def _asked(world: World, api: Api, things: Things, store: str) -> dict[str, Reply]:
    """Everything that a member may try to find out about `store`, and what comes of it."""
    replies: dict[str, Reply] = {}
    etag = '"1"'

    async def get(path: str, **headers: str) -> Reply:
        reply = replies[f"GET {path}"] = await api.get(path, **headers)
        return reply

    async def post(name: str, path: str, body: Any) -> Reply:
        reply = replies[name] = await api.post(path, body)
        return reply

    for path in (
        "/v1", "/v1/stores", "/v1/stores?limit=1", f"/v1/stores?marker={store}", f"/v1/stores/{store}", "/v1/stores?site=eu%2Faz2",
        "/v1/stores?kind=http", "/v1/paths", f"/v1/paths?store={store}", "/v1/paths?limit=1", f"/v1/paths?marker=eu%20{store}%20read",
        f"/v1/images/{things.image}", f"/v1/images/{things.image}/content", f"/v1/blobs/{things.blob}",
        f"/v1/blobs/{things.blob}/replicas", f"/v1/replicas?store={store}", "/v1/replicas?limit=1000&purpose=cache",
        f"/v1/replicas/{things.other}", f"/v1/sites/{store}", f"/{store}", "/metrics", "/v1/copies", f"/v1/copies?image={things.image}",
        f"/v2/images/{things.image}", f"/v2/images/{things.image}/locations", f"/v2/images/{things.image}/tasks", "/v2/info/stores",
        "/v2/info/stores/detail", "/v2/cache",
        f"/ga4gh/drs/v1/objects/{things.image}", f"/ga4gh/drs/v1/objects/{things.blob}", f"/ga4gh/drs/v1/objects/{things.other}",
        f"/ga4gh/drs/v1/objects/{things.blob}/access/{things.replica}", f"/ga4gh/drs/v1/objects/{things.blob}/access/{things.other}",
    ):  # fmt: skip
        await get(path)
    await get(f"/v1/images/{things.image}/content?metalink", Accept="application/metalink4+xml")

    download = {"operation": "download", "blob": things.blob, "count": 16}
    tickets = {
        "a ticket": {}, "prefer": {"prefer": [store]}, "avoid": {"avoid": [store]}, "only": {"only": [store]},
        "only this and that": {"only": [store, "open"]}, "avoid all": {"avoid": [store, "open"]}, "many at once": {"parallel": 16},
        "schemes": {"schemes": ["volume"]}, "a site": {"site": "eu/az2"},
    }  # fmt: skip
    for name, more in tickets.items():
        ticket = await post(name, "/v1/tickets", {**download, **more})
        if ticket.status == 201:
            id = ticket.body["id"]
            await get(f"/v1/tickets/{id}")
            await post(f"{name}: activated", f"/v1/tickets/{id}/activate", {"store": store})
            await post(f"{name}: reported", f"/v1/tickets/{id}/report", {"store": store, "outcome": "ok", "bytes": 1, "seconds": 1})
            await post(f"{name}: again", f"/v1/tickets/{id}/refresh", None)
            replies[f"{name}: released"] = await api.delete(f"/v1/tickets/{id}")
    await post("a batch", "/v1/tickets:batch", {"tickets": [{**download, **more} for more in tickets.values()]})

    fresh = {"operation": "upload", "image": {"name": "x"}, "size": 100, "digests": digests(b"x" * 100), "count": 16}
    uploads = {
        "an upload": {}, "an upload there": {"only": [store]}, "an upload, preferred": {"prefer": [store]},
        "an upload, avoided": {"avoid": [store, "open"]}, "too large": {"size": 1 << 52, "digests": {}},
    }  # fmt: skip
    for name, more in uploads.items():
        begun = await post(name, "/v1/tickets", {**fresh, **more})
        if begun.status == 201:
            await post(f"{name}: activated", f"/v1/tickets/{begun.body['id']}/activate", {"store": store})
            await post(f"{name}: parts", f"/v1/tickets/{begun.body['id']}/parts", {"store": store, "numbers": [1]})
            commit = {"store": store, "size": 100, "digests": digests(b"x" * 100)}
            await post(f"{name}: committed", f"/v1/tickets/{begun.body['id']}/commit", commit)
            replies[f"{name}: released"] = await api.delete(f"/v1/tickets/{begun.body['id']}")
    another = {"operation": "upload", "blob": things.blob, "count": 16}
    await post("a copy", "/v1/tickets", another)
    await post("a copy there", "/v1/tickets", {**another, "only": [store]})

    await post("a copy by an agent", "/v1/copies", {"image": things.image, "store": store})
    await post("an import", f"/v2/images/{things.image}/import", {"method": {"name": "copy-image"}, "stores": [store]})
    await post("an import to all", f"/v2/images/{things.image}/import", {"method": {"name": "copy-image"}, "all_stores": True})
    location = {"op": "add", "path": "/locations/-", "value": {"url": f"{world.disk.url}/{store}/demo/x", "metadata": {}}}
    patch = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
    replies["a location"] = await api.send("PATCH", f"/v2/images/{things.image}", [location], headers=patch)
    replies["deleted there"] = await api.delete(f"/v2/stores/{store}/{things.image}")

    for key in ("demo/x", f"{things.blob}/x", "../x"):
        await post(f"registered {key}"[:15], f"/v1/blobs/{things.blob}/replicas", {"store": store, "key": key})
    await post("registered, to be deleted", f"/v1/blobs/{things.blob}/replicas", {"store": store, "key": "demo/x", "deletable": True})
    replies["changed"] = await api.patch(f"/v1/replicas/{things.other}", {"state": "active"}, etag)
    replies["deleted"] = await api.delete(f"/v1/replicas/{things.other}", etag)
    replies["store changed"] = await api.patch(f"/v1/stores/{store}", {"enabled": False}, etag)
    replies["store deleted"] = await api.delete(f"/v1/stores/{store}", etag)
    await post("store probed", f"/v1/stores/{store}/probe", None)
    # The last copy that he knows of is the last one, whatever lies elsewhere.
    replies["last replica deleted"] = await api.delete(f"/v1/replicas/{things.replica}", etag)
    replies["page of /"] = await _page(world, api)
    return replies


async def _page(world: World, api: Api) -> Reply:
    """The status page, as a program gets it."""
    headers = {"Authorization": f"Bearer {api._token}", "Accept": "text/html"}
    async with world.session.get(f"{world.broker.url}/", headers=headers, allow_redirects=False) as answer:
        return Reply(answer.status, answer.headers, (await answer.read()).decode())


_VARIABLE = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z"), "INSTANT"),
    (re.compile(r"(?:ID/)[A-Za-z0-9_-]{43}"), "KEY"),
    (re.compile(r"token=[A-Za-z0-9._-]+"), "TOKEN"),
    (re.compile(r"record-\d\":\"[^\"]+"), "RECORD"),
    (re.compile(r"(?i)(x-broker-meta-record-\d\":\")[^\"]+"), r"\1"),
    (re.compile(r"\b[0-9a-f]{32,128}\b|(?<=SHA-256=)[^,]+,MD5=\S+|(?<==:)[A-Za-z0-9+/=]+(?=:)"), "DIGEST"),
    (re.compile(r"(?<=\"concurrency\":)\d+|(?<=Retry-After: )\d+"), "NUMBER"),
    (re.compile(r"(?<=\"basis\":)\"[a-z-]+\""), "BASIS"),
    (re.compile(r"\d+\.\d+(?:e-?\d+)?"), "NUMBER"),
)


def plain(reply: Reply, store: str) -> str:
    """An answer without what differs between any two requests; and without what is told of the public store meanwhile."""
    told = reply.body
    if isinstance(told, dict) and "paths" in told:
        told = {"paths": [row for row in told["paths"] if row["store"] != "open"]}
    body = told if isinstance(told, str) else orjson.dumps(told).decode()
    own = ("x-request-id", "x-openstack-request-id", "date", "etag")
    headers = sorted(f"{name}: {value}" for name, value in reply.headers.items() if name.lower() not in own)
    text = "\n".join([str(reply.status), *(line for line in headers if not line.lower().startswith("content-length")), body])
    for pattern, word in _VARIABLE:
        text = pattern.sub(word, text)
    return text.replace(store, "STORE")


async def test_a_private_store_does_not_exist_for_members(world: World) -> None:
    member = world.api(Role.MEMBER)
    await _asked(world, member, await things(world), HIDDEN)  # so that both times the public store has been used and measured
    first = await things(world)
    before = await _asked(world, member, first, HIDDEN)
    ok(await world.api(Role.ADMIN).post("/v1/sites", {"path": "eu/az1/covert"}), 201)
    covert = {"site": "eu/az1/covert", "read_slots": 9, "write_slots": 9, "capacity": 10_000, "exposure": "service"}
    await world.register(HIDDEN, **covert)
    second = await hide(world, await things(world))
    after = await _asked(world, member, second, HIDDEN)
    _nowhere(after.values(), "covert", second.other)
    same = dict(zip(after, before.values(), strict=True))
    differing = {name: (plain(same[name], HIDDEN), plain(reply, HIDDEN)) for name, reply in after.items()}
    differing.pop("page of /")  # lists his own tickets, and there are more of them by now
    leaks = [f"{name}\nwithout:\n{pair[0]}\nwith:\n{pair[1]}" for name, pair in differing.items() if pair[0] != pair[1]]
    assert not leaks, "\n\n".join(leaks)
    assert len(same) >= 60


async def test_bytes_that_only_a_private_store_has(world: World) -> None:
    """They are not known content, and whoever may see their image, in whatever project and role, finds nothing of where they lie."""
    await world.register(HIDDEN, exposure="service")
    content = secrets.token_bytes(300)
    service, member = world.api(Role.SERVICE, "demo", "covert"), world.api(Role.MEMBER)
    done = await world.put(service, content, HIDDEN, image={"name": "x", "visibility": "community"})
    known, unknown = [
        ok(await member.post("/v1/tickets", {**new_upload(body), "count": 16}), 201) for body in (content, secrets.token_bytes(300))
    ]
    assert "known" not in known
    assert [place["store"] for place in known["destinations"]] == [place["store"] for place in unknown["destinations"]] == ["open"]
    assert known["excluded"] == unknown["excluded"] == []
    found = Things(done["image"], done["blob"]["id"], str(uuid4()), done["replica"]["id"], b"")
    for role in (Role.MEMBER, Role.READER):
        replies = await _asked(world, world.api(role, "other"), found, "open")
        _nowhere(replies.values(), HIDDEN, "covert", done["replica"]["id"])


def _nowhere(replies: Iterable[Reply], *words: str) -> None:
    for reply in replies:
        text = (reply.body if isinstance(reply.body, str) else orjson.dumps(reply.body).decode()) + str(sorted(reply.headers.items()))
        for word in words:
            assert word not in text, text
