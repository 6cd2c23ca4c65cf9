"""The invariants of the design, held against two real brokers and real stores over HTTP. Each test names its own.

Others are held elsewhere: 1 in test_bytes.py, 3 in test_slots.py, 4 in test_lying_stores.py, 11 in test_kill.py, 13 in
test_secrets.py, 12 in tests/catalog/test_migrations.py, 14 in test_uploads.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import asyncpg
import botocore.session
import jwt
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from broker.catalog import connect
from tests.parts.broker import Api, BrokerProcess, serve
from tests.parts.cluster import (
    Cluster, digests, fetch, new_upload, ok, opened, put, reasons, register, s3_store, said, send, settle, sources,
)  # fmt: skip
from tests.parts.seaweedfs import S3Part
from tests.parts.swift import SwiftPart

KINDS = ("weed", "disk", "swift")
_numbers = itertools.count(1)


def content(size: int = 50_000) -> bytes:
    """Bytes that no other test has."""
    return random.Random(f"invariants {next(_numbers)} {time.time_ns()}").randbytes(size)


def s3_client(part: S3Part) -> Any:
    """Somebody with the bucket's own keys: who works behind the broker's back."""
    return botocore.session.get_session().create_client(
        "s3", endpoint_url=part.endpoint, region_name=part.region, aws_access_key_id=part.access_key, aws_secret_access_key=part.secret_key
    )


@pytest.fixture
async def db(cluster: Cluster) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await connect.connect_one(cluster.database)
    yield connection
    await connection.close()


@pytest.fixture
def member(cluster: Cluster, session: aiohttp.ClientSession) -> Api:
    return cluster.api(session)


@pytest.fixture
def admin(cluster: Cluster, session: aiohttp.ClientSession) -> Api:
    return cluster.api(session, "admin")


async def until(what: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Wait until `what` holds; fail when that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not await what():
        assert time.monotonic() < end, "it did not come to pass in time"
        await asyncio.sleep(0.05)


async def change(admin: Api, path: str, body: dict[str, Any]) -> Any:
    """PATCH at the version that is there."""
    return ok(await admin.patch(path, body, (await admin.get(path)).etag))


# -- 2: only active replicas, on enabled stores, that the principal may see


@dataclass(frozen=True)
class Shelves:
    """Two stores in one bucket, and a community image with a replica on each."""

    image: str
    blob: str
    content: bytes


@pytest.fixture(scope="module")
def shelves(cluster: Cluster) -> Shelves:
    """The stores ``shelf``, which tests put into every state, and ``steady``."""

    async def prepare() -> Shelves:
        settings = {"bucket": cluster.weed.bucket, "region": cluster.weed.region}
        await register(
            cluster, *(s3_store(cluster, cluster.weed, name, settings={**settings, "prefix": f"{name}/"}) for name in ("shelf", "steady"))
        )
        async with aiohttp.ClientSession() as session:
            data = content()
            made = await put(cluster.api(session), session, data, "steady", "shelf")
            await change(cluster.api(session, "admin"), f"/v1/images/{made['image']}", {"visibility": "community"})
        return Shelves(made["image"], made["blob"]["id"], data)

    return asyncio.run(prepare())


PRINCIPALS = {
    "owner": {"role": "member"},
    "own reader": {"role": "reader", "subject": "rita"},
    "stranger": {"role": "member", "project": "elsewhere", "subject": "stan"},
    "service": {"role": "service", "project": "nova", "subject": "nova"},
    "admin": {"role": "admin", "project": "ops", "subject": "root"},
}
SITUATIONS: dict[str, tuple[str, set[str], str]] = {
    # What is done to the store or the replica, who is still offered it, and the reason that others are told.
    "active": ("", set(PRINCIPALS), ""),
    "pending": ("UPDATE replicas SET state = 'pending'", set(), "pending"),
    "unsealed": ("UPDATE replicas SET state = 'unsealed'", {"owner", "own reader"}, "unsealed"),
    "corrupt": ("UPDATE replicas SET state = 'corrupt'", set(), "corrupt"),
    "missing": ("UPDATE replicas SET state = 'missing'", set(), "missing"),
    "deleting": ("UPDATE replicas SET state = 'deleting'", set(), "deleting"),
    "disabled": ("UPDATE stores SET enabled = false", set(), "disabled"),
    "private": ("UPDATE stores SET exposure = 'service'", {"service", "admin"}, ""),
    "private and corrupt": ("UPDATE stores SET exposure = 'service'; UPDATE replicas SET state = 'corrupt'", set(), "corrupt"),
}  # fmt: skip
WHERE = {"replicas": "store_id = (SELECT id FROM stores WHERE name = 'shelf')", "stores": "name = 'shelf'"}


async def put_into(db: Any, sql: str) -> None:
    """Do `sql` to the store ``shelf`` or what lies on it, as other brokers and operators would."""
    for statement in filter(None, sql.split("; ")):
        await db.execute(f"{statement} WHERE {WHERE[statement.split()[1]]}")


@pytest.mark.parametrize("situation", SITUATIONS)
async def test_only_what_is_active_enabled_and_visible_is_offered(
    situation: str, cluster: Cluster, shelves: Shelves, session: aiohttp.ClientSession, db: Any
) -> None:
    """Invariant 2: in every state and exposure, for every role, by every way to a URL, at both brokers."""
    sql, may, reason = SITUATIONS[situation]
    asked = {"operation": "download", "image": shelves.image}
    apis = {who: [cluster.api(session, at=at, **how) for at in (0, 1)] for who, how in PRINCIPALS.items()}
    before = {who: ok(await mine[0].post("/v1/tickets", asked), 201) for who, mine in apis.items()}
    assert all(set(sources(ticket)) == {"shelf", "steady"} for ticket in before.values())

    async def owner_sees(stores: set[str]) -> bool:
        return all([set(sources(ok(await api.post("/v1/tickets", asked), 201))) == stores for api in apis["owner"]])

    await put_into(db, sql)
    try:
        await until(lambda: owner_sees({"shelf", "steady"} if "owner" in may else {"steady"}), 2)
        if "owner" in may:
            await asyncio.sleep(0.6)  # nothing to see for the owner; a poll comes every 0.5 s
        for who, mine in apis.items():
            expected = {"shelf", "steady"} if who in may else {"steady"}
            hidden = "private" in situation and who not in ("service", "admin")
            told = {} if who in may or hidden else {"shelf": reason}
            for api in mine:
                fresh = ok(await api.post("/v1/tickets", asked), 201)
                (many,) = ok(await api.post("/v1/tickets:batch", {"tickets": [asked]}))["tickets"]
                by_blob = ok(await api.post("/v1/tickets", {"operation": "download", "blob": shelves.blob}), 201)
                again = ok(await api.post(f"/v1/tickets/{before[who]['id']}/refresh"))
                for ticket in (fresh, many, by_blob, again):
                    assert set(sources(ticket)) == expected, who
                    assert reasons(ticket["excluded"]) == told, who
                    assert not hidden or "shelf" not in str(ticket)
                activated = await api.post(f"/v1/tickets/{before[who]['id']}/activate", {"store": "shelf"})
                if who in may:
                    assert "shelf" in sources(ok(activated))
                else:
                    # Not even the URL of another place: what was asked for cannot be had.
                    assert activated.status in (400, 409), (who, activated.body)
                known = {entry["store"] for entry in ok(await api.get(f"/v1/blobs/{shelves.blob}/replicas"))["replicas"]}
                assert not (hidden and "shelf" in known)
    finally:
        await db.execute(f"UPDATE replicas SET state = 'active' WHERE {WHERE['replicas']}")
        await db.execute(f"UPDATE stores SET enabled = true, exposure = 'public' WHERE {WHERE['stores']}")
        await until(lambda: owner_sees({"shelf", "steady"}), 2)


async def test_an_image_that_may_not_be_read_gives_no_ticket(cluster: Cluster, session: aiohttp.ClientSession) -> None:
    """Invariant 2: private images answer strangers as if there were none; deactivated ones give URLs to administrators alone."""
    member, admin = cluster.api(session), cluster.api(session, "admin")
    stranger = cluster.api(session, project="elsewhere", at=1)
    made = await put(member, session, content(), "weed")
    asked = {"operation": "download", "image": made["image"]}
    ticket = ok(await member.post("/v1/tickets", asked), 201)
    nowhere = await stranger.post("/v1/tickets", {**asked, "image": "0" * 8 + made["image"][8:]})
    refused = await stranger.post("/v1/tickets", asked)
    assert (refused.status, refused.body) == (404, nowhere.body)
    (many,) = ok(await stranger.post("/v1/tickets:batch", {"tickets": [asked]}))["tickets"]
    assert many == nowhere.body
    for way in ("/refresh", "/activate", "/report", "/commit", "/parts", ""):
        body = {"": None, "/refresh": None, "/activate": {"store": "weed"}, "/commit": said(b"x"), "/parts": {"numbers": [1]}}.get(
            way, {"store": "weed", "outcome": "ok"}
        )
        path = f"/v1/tickets/{ticket['id']}{way}"
        assert (await (stranger.post(path, body) if way else stranger.get(path))).status == 404, way
    await change(admin, f"/v1/images/{made['image']}", {"status": "deactivated"})
    await settle()
    for at in (0, 1):
        mine = cluster.api(session, at=at)
        assert (await mine.post("/v1/tickets", asked)).status == 403
        assert (await mine.post("/v1/tickets", {"operation": "download", "blob": made["blob"]["id"]})).status == 404
        assert (await mine.post(f"/v1/tickets/{ticket['id']}/refresh")).status in (403, 404, 409, 410)
        assert (await mine.post(f"/v1/tickets/{ticket['id']}/activate", {"store": "weed"})).status in (403, 404, 409, 410)
        assert (await cluster.api(session, "admin", at=at).post("/v1/tickets", asked)).status == 201
