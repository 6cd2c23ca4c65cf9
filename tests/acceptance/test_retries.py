"""A retry of every POST, at the other broker and many at once: the same thing again, and nothing twice."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import pytest

from broker.catalog import connect
from broker.web import contract
from tests.parts.broker import Api, Reply
from tests.parts.cluster import Cluster, digests, new_upload, ok, put, register, s3_client, s3_store, said, send, settle

_numbers = itertools.count(1)
COUNTED = ("sites", "stores", "images", "blobs", "replicas", "tickets", "uploads", "destinations", "leases", "reports", "copies")


@dataclass(frozen=True)
class Scene:
    """Two brokers, a store with slots, an image on it, and a principal of one's own."""

    cluster: Cluster
    session: aiohttp.ClientSession
    db: asyncpg.Connection[asyncpg.Record]
    subject: str
    content: bytes
    made: dict[str, Any]

    def api(self, at: int, role: str = "member") -> Api:
        return self.cluster.api(self.session, role, at=at, subject=self.subject)

    async def counts(self) -> dict[str, int]:
        """Rows of everything that a POST could make."""
        return {table: await self.db.fetchval(f"SELECT count(*) FROM {table}") for table in COUNTED}


@pytest.fixture(scope="module")
def slotted(cluster: Cluster) -> str:
    """A store where every transfer needs a lease."""
    settings = {"bucket": cluster.weed.bucket, "region": cluster.weed.region, "prefix": "slotted/"}
    asyncio.run(register(cluster, s3_store(cluster, cluster.weed, "slotted", settings=settings, read_slots=50, write_slots=50)))
    return "slotted"


@pytest.fixture
async def scene(cluster: Cluster, slotted: str, session: aiohttp.ClientSession) -> AsyncIterator[Scene]:
    db = await connect.connect_one(cluster.database)
    subject, content = f"retrier-{next(_numbers)}", os.urandom(1000)
    made = await put(cluster.api(session, subject=subject), session, content, slotted)
    yield Scene(cluster, session, db, subject, content, made)
    await db.close()


Request = tuple[str, str, Any, Any]
"""Role, path, body, and another body."""


async def _download(scene: Scene) -> Request:
    asked = {"operation": "download", "image": scene.made["image"]}
    return "member", "/v1/tickets", asked, {**asked, "count": 1}


async def _upload(scene: Scene) -> Request:
    return "member", "/v1/tickets", new_upload(os.urandom(900), only=["slotted"]), new_upload(os.urandom(901), only=["slotted"])


async def _large_upload(scene: Scene) -> Request:
    large = {"operation": "upload", "image": {"name": "large"}, "size": 200 << 20, "only": ["slotted"]}
    return "member", "/v1/tickets", large, {**large, "size": 201 << 20}


async def _ticket(scene: Scene, **asked: Any) -> str:
    reply = await scene.api(0).post("/v1/tickets", {"operation": "download", "image": scene.made["image"], **asked})
    return str(ok(reply, 201)["id"])


async def _refresh(scene: Scene) -> Request:
    return "member", f"/v1/tickets/{await _ticket(scene)}/refresh", None, None


async def _activate(scene: Scene) -> Request:
    return "member", f"/v1/tickets/{await _ticket(scene)}/activate", {"store": "slotted"}, {"store": "weed"}


async def _report(scene: Scene) -> Request:
    body = {"store": "slotted", "outcome": "ok", "bytes": 1000, "seconds": 0.5}
    return "member", f"/v1/tickets/{await _ticket(scene)}/report", body, {**body, "seconds": 0.6}


async def _parts(scene: Scene) -> Request:
    large = {"operation": "upload", "image": {"name": "large"}, "size": 200 << 20, "only": ["slotted"]}
    ticket = ok(await scene.api(0).post("/v1/tickets", large), 201)
    return "member", f"/v1/tickets/{ticket['id']}/parts", {"numbers": [1, 2]}, {"numbers": [3]}


async def _commit(scene: Scene) -> Request:
    content = os.urandom(1100)
    ticket = ok(await scene.api(0).post("/v1/tickets", new_upload(content, only=["slotted"])), 201)
    assert await send(scene.session, ticket["destinations"][0], content) == 200
    return "member", f"/v1/tickets/{ticket['id']}/commit", said(content), {**said(content), "digests": {"md5": digests(content)["md5"]}}


async def _image(scene: Scene) -> Request:
    return "member", "/v1/images", {"name": "named"}, {"name": "named otherwise"}


async def _replica(scene: Scene) -> Request:
    key = f"demo/{uuid4().hex}"
    s3_client(scene.cluster.weed).put_object(Bucket=scene.cluster.weed.bucket, Key=key, Body=scene.content)
    path = f"/v1/blobs/{scene.made['blob']['id']}/replicas"
    return "member", path, {"store": "weed", "key": key}, {"store": "weed", "key": key, "deletable": True}


async def _adopted(scene: Scene) -> Request:
    key = f"demo/{uuid4().hex}"
    s3_client(scene.cluster.weed).put_object(Bucket=scene.cluster.weed.bucket, Key=key, Body=os.urandom(1200))
    path, body = f"/v1/images/{scene.made['image']}/blobs", {"format": "iso", "store": "weed", "key": key}
    return "member", path, body, {**body, "format": "vmdk"}


async def _copy(scene: Scene) -> Request:
    body = {"image": scene.made["image"], "store": "disk"}
    return "member", "/v1/copies", body, {**body, "purpose": "cache"}


async def _store(scene: Scene) -> Request:
    name = f"store-{next(_numbers)}"
    settings = {"bucket": scene.cluster.weed.bucket, "region": scene.cluster.weed.region, "prefix": f"{name}/"}
    body = s3_store(scene.cluster, scene.cluster.weed, name, settings=settings)
    return "admin", "/v1/stores", body, {**body, "cost": 1}


async def _probe(scene: Scene) -> Request:
    return "admin", "/v1/stores/slotted/probe", None, None


async def _site(scene: Scene) -> Request:
    path = f"eu/site{next(_numbers)}"
    return "admin", "/v1/sites", {"path": path}, {"path": path, "description": "another"}


async def _rotation(scene: Scene) -> Request:
    return "admin", "/v1/keys", {}, {"algorithm": "RS256"}


POSTS: dict[str, tuple[str, Callable[[Scene], Awaitable[Request]]]] = {
    "a download": ("createTicket", _download),
    "an upload": ("createTicket", _upload),
    "an upload in parts": ("createTicket", _large_upload),
    "refresh": ("refreshTicket", _refresh),
    "activate": ("activatePlace", _activate),
    "report": ("reportTransfer", _report),
    "parts": ("signParts", _parts),
    "commit": ("commitUpload", _commit),
    "image": ("createImage", _image),
    "replica": ("registerReplica", _replica),
    "adopted": ("adoptObject", _adopted),
    "copy": ("createCopy", _copy),
    "store": ("createStore", _store),
    "probe": ("probeStore", _probe),
    "rotation": ("rotateKeys", _rotation),
    "site": ("createSite", _site),
}
SIGNED = ("url", "headers", "expires_at", "probed_at", "probe", "abilities", "lease_expires_at", "excluded", "rank")


def lasting(value: Any) -> Any:
    """An answer without what is signed, measured or drawn anew each time."""
    if isinstance(value, dict):
        return {name: lasting(entry) for name, entry in value.items() if name not in SIGNED}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


UNKEYED = {
    "createTickets",  # each of its tickets is taken for itself
    "explainTicket",  # makes nothing
    "addMember",  # who is one already stays one: 409
    "tellVerdict",  # the last one counts, and it is the same
    "takeCopy",  # what nobody tells of is given to another agent after a while
    "reportCopy",  # what has been told is told
}
"""Operations without a key, and why they need none."""


def test_every_post_is_tried() -> None:
    posts = [operation for operation in contract.NATIVE.operations() if operation.method == "POST"]
    keyed = {post.id for post in posts if any(parameter.name == "Idempotency-Key" for parameter in post.of("header"))}
    assert {post.id for post in posts} - keyed == UNKEYED
    assert {operation for operation, _ in POSTS.values()} == keyed


@pytest.mark.parametrize("name", POSTS)
async def test_the_same_request_again_is_the_same_thing(name: str, scene: Scene) -> None:
    """A retry at the other broker, and four more at once: one resource, one row, one lease. Another body under the key: 422."""
    _, prepare = POSTS[name]
    role, path, body, other = await prepare(scene)
    apis, key = [scene.api(at, role) for at in (0, 1)], f"key-{uuid4().hex}"

    async def post(at: int) -> Reply:
        return await apis[at].post(path, body, Idempotency_Key=key)

    first = await post(0)
    assert first.status in (200, 201, 204), first.body
    if path == "/v1/stores":
        await settle(scene.cluster)  # the other broker learns of it
    counts = await scene.counts()
    again = [await post(1)]
    if name != "probe":  # of several looks at once one is kept; the others are told to look again
        again += await asyncio.gather(*(post(at) for at in (0, 1, 0, 1)))
    for reply in again:
        assert reply.status == first.status, reply.body
        assert lasting(reply.body) == lasting(first.body)
    assert await scene.counts() == counts
    if path.endswith("/refresh"):
        elsewhere = await apis[1].post(f"/v1/tickets/{await _ticket(scene)}/refresh", Idempotency_Key=key)
        assert (elsewhere.status, elsewhere.body["type"]) == (422, "/problems/idempotency-mismatch")
    if other is not None:
        changed = await apis[1].post(path, other, Idempotency_Key=key)
        assert (changed.status, changed.body["type"]) == (422, "/problems/idempotency-mismatch")
        assert await scene.counts() == counts


@pytest.mark.parametrize("name", ["a download", "an upload", "an upload in parts", "image"])
async def test_many_at_once_make_one(name: str, scene: Scene) -> None:
    """The same first request eight times at once at two brokers."""
    _, prepare = POSTS[name]
    role, path, body, _ = await prepare(scene)
    apis, key = [scene.api(at, role) for at in (0, 1)], f"key-{uuid4().hex}"
    before = await scene.counts()
    replies = await asyncio.gather(*(apis[n % 2].post(path, body, Idempotency_Key=key) for n in range(8)))
    assert {reply.status for reply in replies} == {201}, [reply.body for reply in replies if reply.status != 201]
    assert len({reply.body["id"] for reply in replies}) == 1
    after = await scene.counts()
    risen = {table: after[table] - before[table] for table in ("images", "tickets", "uploads", "leases")}
    expected = {"a download": (0, 1, 0, 1), "image": (1, 0, 0, 0)}.get(name, (1, 1, 1, 1))
    assert tuple(risen.values()) == expected, risen
