"""Invariant 4 and bad input: a store that lies, fails, redirects or hangs, at commit and at registration, over HTTP.

A real store works behind a tap that the tests turn (tests/parts/tap.py). Nothing becomes active, nothing is half done, the
problem says what happened, and what can be repeated is repeated.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import pytest

from broker.stores import exchange
from tests.parts.broker import Api, RunningBroker
from tests.parts.cluster import SITE, new_upload, ok, reasons, s3_client, said, send
from tests.parts.process import free_ports
from tests.parts.seaweedfs import S3Part
from tests.parts.tap import LIES, Tap, tapped

CONTENT = random.Random(44).randbytes(70_000)
TROUBLE = ("fails", "redirects", "cuts", "hangs")


@dataclass(frozen=True)
class Scene:
    """A broker, a store behind a tap, and who asks."""

    member: Api
    admin: Api
    tap: Tap
    broker: RunningBroker
    session: aiohttp.ClientSession

    async def written(self, **fields: Any) -> dict[str, Any]:
        """A ticket whose bytes have arrived."""
        ticket: dict[str, Any] = ok(await self.member.post("/v1/tickets", new_upload(CONTENT, **fields)), 201)
        assert await send(self.session, ticket["destinations"][0], CONTENT) in (200, 201)
        return ticket

    async def committed(self) -> dict[str, Any]:
        """An active image; its commit."""
        ticket = await self.written()
        done: dict[str, Any] = ok(await self.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT)))
        return done

    @contextlib.contextmanager
    def trouble(self, name: str) -> Iterator[None]:
        """The store misbehaves so, or tells that lie. Only meanwhile the broker waits for it no longer than 2 s."""
        with patch.object(exchange, "TOTAL_SECONDS", 2.0):
            if name in LIES:
                self.tap.alters = LIES[name]
            else:
                self.tap.misbehaves = name
            yield
            self.tap.misbehaves = self.tap.alters = None

    async def active(self, expected: int) -> None:
        """So many replicas, blobs and images are active, and there are no other replicas."""
        found = await self.broker.context.db.fetchrow(
            """SELECT (SELECT count(*) FROM replicas) AS replicas, (SELECT count(*) FROM blobs WHERE state = 'active') AS blobs,
                      (SELECT count(*) FROM images WHERE status = 'active') AS images"""
        )
        assert found is not None and tuple(found) == (expected,) * 3


async def _scene(part: S3Part, broker: RunningBroker, session: aiohttp.ClientSession, tap: Tap) -> Scene:
    admin = Api(broker.url, session, broker.token("admin"))
    ok(await admin.post("/v1/sites", {"path": SITE}), 201)
    store = {
        "name": "tapped", "kind": "s3", "site": SITE, "endpoint": tap.url, "internal": True, "write_slots": 4,
        "credential": broker.credential("tapped", part.credential), "settings": {"bucket": part.bucket, "region": part.region},
    }  # fmt: skip
    ok(await admin.post("/v1/stores", store), 201)
    return Scene(Api(broker.url, session, broker.token()), admin, tap, broker, session)


@pytest.fixture
async def strong(seaweedfs: S3Part, broker: RunningBroker, session: aiohttp.ClientSession) -> AsyncIterator[Scene]:
    """SeaweedFS, which computes SHA-256."""
    async with tapped(seaweedfs.endpoint) as tap:
        yield await _scene(seaweedfs, broker, session, tap)


@pytest.fixture
async def weak(rclone: S3Part, broker: RunningBroker, session: aiohttp.ClientSession) -> AsyncIterator[Scene]:
    """rclone, which stores what it was told to refuse, and repeats claims."""
    async with tapped(rclone.endpoint) as tap:
        yield await _scene(rclone, broker, session, tap)


async def test_what_a_store_tells_differently_never_becomes_active(strong: Scene) -> None:
    """Invariant 4: neither by a commit nor by a registration; the bytes of the upload go, and the blob can be uploaded again."""
    for lie in ("size", "digests"):
        ticket = await strong.written()
        strong.tap.alters = LIES[lie]
        refused = await strong.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT))
        assert (refused.status, refused.body["type"]) == (409, "/problems/mismatch"), lie
        assert refused.body["declared"] != refused.body["observed"]
        await strong.active(0)
        gone = await strong.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT))
        assert gone.status == 410
        strong.tap.alters = None
        assert (await strong.member.post("/v1/tickets", {"operation": "download", "image": ticket["image"]})).status == 409
    strong.tap.alters = None
    again = {"operation": "upload", "blob": ticket["blob"]["id"], **said(CONTENT)}
    second = ok(await strong.member.post("/v1/tickets", again), 201)
    assert await send(strong.session, second["destinations"][0], CONTENT) in (200, 201)
    done = ok(await strong.member.post(f"/v1/tickets/{second['id']}/commit", said(CONTENT)))
    assert done["replica"]["observed"]["by"] == "broker"
    assert "sha256" in done["replica"]["observed"]["strength"]
    assert ok(await strong.member.get(f"/v1/images/{ticket['image']}"))["status"] == "active"


async def test_size_alone_is_no_proof(strong: Scene) -> None:
    """Invariant 4: a store that tells no digest proves nothing; when it speaks again, the same commit succeeds."""
    ticket = await strong.written()
    path = f"/v1/tickets/{ticket['id']}/commit"
    strong.tap.alters = LIES["silence"]
    assert (await strong.member.post(path, said(CONTENT))).body["type"] == "/problems/unverifiable"
    await strong.active(0)
    strong.tap.alters = None
    assert ok(await strong.member.post(path, said(CONTENT)))["state"] == "committed"


async def test_a_weak_store_is_not_believed(weak: Scene, rclone: S3Part) -> None:
    """Invariant 4: rclone repeats a claimed SHA-256 whatever it has; only the MD5 that it computes counts, and other bytes are found."""
    store = ok(await weak.admin.get("/v1/stores/tapped"))
    assert store["abilities"]["observes"] == ["md5"]
    ticket = ok(await weak.member.post("/v1/tickets", {"operation": "upload", "image": {"name": "x"}, "size": len(CONTENT)}), 201)
    assert await send(weak.session, ticket["destinations"][0], CONTENT[::-1]) == 200
    path = f"/v1/tickets/{ticket['id']}/commit"
    only_sha = {"size": len(CONTENT), "digests": {"sha256": said(CONTENT)["digests"]["sha256"]}}
    assert (await weak.member.post(path, only_sha)).body["type"] == "/problems/unverifiable"
    await weak.active(0)
    assert (await weak.member.post(path, said(CONTENT))).body["type"] == "/problems/mismatch"
    await weak.active(0)


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_a_store_in_trouble_at_commit(trouble: str, strong: Scene) -> None:
    """Bad input: 503 with Retry-After or a plain refusal to repeat, no redirect followed, nothing active, and the commit succeeds later."""
    ticket = await strong.written()
    with strong.trouble(trouble):
        refused = await strong.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT))
    assert (refused.status, refused.body["type"]) == (503, "/problems/store-unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert strong.tap.trapped == 0
    await strong.active(0)
    assert ok(await strong.member.get(f"/v1/tickets/{ticket['id']}"))["state"] == "open"
    done = ok(await strong.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT)))
    assert done == ok(await strong.member.post(f"/v1/tickets/{ticket['id']}/commit", said(CONTENT)))
    assert await strong.broker.context.db.fetchval("SELECT count(*) FROM leases") == 0


@pytest.mark.parametrize("trouble", [*TROUBLE, "size", "digests", "silence"])
async def test_a_store_in_trouble_at_registration(trouble: str, strong: Scene, seaweedfs: S3Part) -> None:
    """Invariants 4 and 9: a registration believes only what it sees, follows nothing, registers nothing otherwise, deletes nothing."""
    blob, key = (await strong.committed())["blob"]["id"], f"demo/registered-{time.time_ns()}"
    path, body = f"/v1/blobs/{blob}/replicas", {"store": "tapped", "key": key, "deletable": True}
    assert (await strong.member.post(path, body)).body["type"] == "/problems/not-uploaded"
    s3_client(seaweedfs).put_object(Bucket=seaweedfs.bucket, Key=key, Body=CONTENT, ChecksumAlgorithm="SHA256")
    expected = {"size": "mismatch", "digests": "mismatch", "silence": "unverifiable"}.get(trouble, "store-unavailable")
    with strong.trouble(trouble):
        refused = await strong.member.post(path, body)
    assert refused.body["type"] == f"/problems/{expected}"
    assert strong.tap.trapped == 0
    await strong.active(1)
    assert await strong.broker.context.db.fetchval("SELECT count(*) FROM deletions WHERE key = $1", key) == 0
    assert ok(await strong.member.post(path, body), 201)["state"] == "active"


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_a_store_in_trouble_is_no_destination_and_not_registered(trouble: str, strong: Scene) -> None:
    """Bad input: multipart uploads need the store at the start; nothing of the refused ones stays. And such a store cannot be added."""
    large = {"operation": "upload", "image": {"name": "large"}, "size": 200 << 20}
    with strong.trouble(trouble):
        refused = await strong.member.post("/v1/tickets", large)
    assert refused.status == 503
    assert reasons(refused.body["excluded"]) == {"tapped": "unreachable"}
    db = strong.broker.context.db
    for table in ("images", "uploads", "leases", "blobs", "tickets"):
        assert await db.fetchval(f"SELECT count(*) FROM {table}") == 0, table
    assert await db.fetchval("SELECT sum(taken)::int FROM spaces") == 0
    another = ok(await strong.admin.get("/v1/stores/tapped"))
    body = {name: another[name] for name in ("kind", "site", "endpoint", "internal", "credential", "settings")}
    with strong.trouble(trouble):
        added = await strong.admin.post("/v1/stores", {"name": "second", **body, "settings": {**body["settings"], "prefix": "second/"}})
    assert (added.status, added.body["type"]) == (503, "/problems/store-unavailable")
    assert (await strong.admin.get("/v1/stores/second")).status == 404
    with strong.trouble(trouble):
        changed = await strong.admin.patch("/v1/stores/tapped", {"settings": {"prefix": "x/"}}, "*")
    assert changed.status == 503
    assert ok(await strong.admin.get("/v1/stores/tapped"))["settings"] == body["settings"]
    assert strong.tap.trapped == 0


async def test_only_administrators_name_endpoints(strong: Scene, tmp_path: Path) -> None:
    """Invariant 9: no field of any request of others is a place; what looks like one is a key below one's project, or refused."""
    (port,) = free_ports(1)
    async with tapped(f"http://127.0.0.1:{port}") as trap:
        path = f"/v1/blobs/{(await strong.committed())['blob']['id']}/replicas"
        before = len(strong.tap.seen)
        for key in (
            f"{trap.url}/x", "//evil/x", "../../etc/passwd", "demo/../other/x", "demo/./x", "demo//x", "/demo/x", "demo/x/", "other/x",
            "demo/x\\..\\y\x00", "DEMO/x", "demo", "demo%2Fx/y", "http:demo/x",
        ):  # fmt: skip
            refused = await strong.member.post(path, {"store": "tapped", "key": key})
            assert (refused.status, refused.body["field"]) in ((400, "key"), (403, "key")), key
        assert len(strong.tap.seen) == before  # refused before the store was asked
        for field in ("url", "location", "endpoint", "href"):
            assert (await strong.member.post(path, {"store": "tapped", "key": "demo/x", field: trap.url})).status == 400
        for store in (trap.url, "127.0.0.1", "tapped@evil", "tapped/../x", "..", "nowhere"):
            assert (await strong.member.post(path, {"store": store, "key": "demo/x"})).status in (400, 404)
        # What is legal as a key stays one: asked of the registered store, under the project's folder, and of nobody else.
        for key in (f"demo/{trap.url}".replace("//", "/"), "demo/x?versionId=1&y#z", "demo/%2e%2e/%2e%2e/x", "demo/@evil:80", "demo/ü ☃"):
            assert (await strong.member.post(path, {"store": "tapped", "key": key})).body["type"] == "/problems/not-uploaded", key
        assert all("demo/" in seen_path for _, seen_path in strong.tap.seen[before:])
        body = {"name": "mine", "kind": "http", "site": SITE, "endpoint": trap.url, "internal": True}
        for role in ("member", "service", "reader"):
            mine = strong.member.as_(strong.broker.token(role, subject=role))
            assert (await mine.post("/v1/stores", body)).status == 403
            assert (await mine.patch("/v1/stores/tapped", {"endpoint": trap.url}, "*")).status == 403
            assert (await mine.post("/v1/stores/tapped/probe")).status == 403
        for endpoint in (f"{trap.url}/x", "file:///etc/passwd", "gopher://x", "http://u:p@127.0.0.1", "http://127.0.0.1?x", "//x"):
            assert (await strong.admin.post("/v1/stores", {**body, "endpoint": endpoint})).status == 400, endpoint
        assert trap.seen == []


async def test_addresses_inside_the_network_are_opened_for_stores_that_are_declared_internal_alone(strong: Scene) -> None:
    """Invariant 9: an administrator's slip is no door either, and the refusal says what to set."""
    (port,) = free_ports(1)
    async with tapped(f"http://127.0.0.1:{port}") as trap:
        body = {"name": "mine", "kind": "http", "site": SITE, "endpoint": trap.url}
        for there in (trap.url, trap.url.replace("127.0.0.1", "localhost"), trap.url.replace("127.0.0.1", "[::ffff:127.0.0.1]")):
            for fields in ({"endpoint": there}, {"endpoint": "http://store.example", "internal_endpoint": there}):
                refused = await strong.admin.post("/v1/stores", {**body, **fields})
                assert (refused.status, refused.body["field"]) == (400, "internal"), refused.body
                assert "loopback" in refused.body["detail"]
                assert "--internal" in refused.body["expected"]
        for there in ("http://169.254.169.254", "http://[fe80::1]", "http://[::ffff:169.254.169.254]", "http://0.0.0.0"):
            refused = await strong.admin.post("/v1/stores", {**body, "endpoint": there, "internal": True})
            assert (refused.status, refused.body["field"]) == (400, "endpoint"), refused.body
        assert trap.seen == []
    assert (await strong.admin.get("/v1/stores/mine")).status == 404
    known = await strong.admin.get("/v1/stores/tapped")
    assert known.body["internal"] is True
    refused = await strong.admin.patch("/v1/stores/tapped", {"internal": False}, known.etag)
    assert (refused.status, refused.body["field"]) == (400, "internal")
    assert ok(await strong.admin.get("/v1/stores/tapped")) == known.body
