"""Uploads through tickets on real stores: up in one PUT and in parts, compared, sealed, and what is left over removed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from broker import errors
from broker.service import commit as commits
from broker.service import images, reap, upload
from broker.service.context import Context
from broker.stores.base import FindsMultipart, PartWrite
from tests.parts.desk import Desk, client, digests
from tests.parts.seaweedfs import S3Part

ME = client()
MEBIBYTE = 1 << 20
KINDS = ("seaweedfs", "swift", "storeside_part")
SMALL = random.Random(7).randbytes(100_000)
LARGE = random.Random(8).randbytes(11 * MEBIBYTE + 17)
IN_PARTS = {"single_put_limit": MEBIBYTE, "min_part_size": 5 * MEBIBYTE}


@pytest.fixture(params=KINDS)
async def context(request: pytest.FixtureRequest, desk: Desk) -> Context:
    """A broker whose only store is real; small things go in one PUT, others in parts of 5 MiB."""
    part = request.getfixturevalue(request.param)
    register: dict[str, Callable[[Any], Awaitable[None]]] = {
        "seaweedfs": desk.seaweedfs, "swift": desk.swift, "storeside_part": desk.storeside
    }  # fmt: skip
    await register[request.param](part)
    return await desk.broker(**IN_PARTS)


def new(content: bytes, **fields: Any) -> dict[str, Any]:
    return {"operation": "upload", "image": {"name": "i"}, "size": len(content), "digests": digests(content), **fields}


def said(content: bytes, **fields: Any) -> dict[str, Any]:
    return {"size": len(content), "digests": digests(content), **fields}


def said_by_parts(content: bytes, place: dict[str, Any]) -> dict[str, Any]:
    """A commit that tells each part's digests as well: a store may know no others."""
    step = place["part_size"]
    bodies = [content[begin : begin + step] for begin in range(0, len(content), step)]
    return said(content, parts=[{"number": n, "size": len(body), "digests": digests(body)} for n, body in enumerate(bodies, 1)])


async def send_parts(desk: Desk, place: dict[str, Any], content: bytes, *, skip: int = 0) -> None:
    for part in place["parts"]:
        if part["number"] != skip:
            status = await desk.send(part, content[part["offset"] : part["offset"] + part["length"]])
            assert status in (200, 201), status


async def stored(context: Context, key: str) -> bool:
    (name,) = context.memory.stores()
    return await context.memory.driver(name).stat(key) is not None


async def test_one_put(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, new(SMALL))
    (place,) = ticket["destinations"]
    assert "parts" not in place and await desk.send(place, SMALL) in (200, 201)
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said(SMALL))
    key = answer["replica"]["key"]
    assert await desk.fetch(context, place["store"], key) == SMALL
    # Invariant 14: the same URL, still alive, with other bytes.
    await desk.send(place, SMALL[::-1])
    assert await desk.fetch(context, place["store"], key) == SMALL
    await context.db.execute("UPDATE deletions SET due_at = now()")
    await reap.reap(context)
    assert await desk.fetch(context, place["store"], key) == SMALL
    staged = await context.db.fetchval("SELECT staging_key FROM destinations")
    assert staged == key or not await stored(context, staged)
    assert await context.db.fetchval("SELECT count(*) FROM deletions") == 0


async def test_a_deleted_object_does_not_come_back_by_its_write_url(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, new(SMALL))
    (place,) = ticket["destinations"]
    assert await desk.send(place, SMALL) in (200, 201)
    await commits.commit(context, ME, UUID(ticket["id"]), said(SMALL))
    await images.delete_image(context, ME, UUID(ticket["image"]), None)
    await reap.reap(context)
    staged = await context.db.fetchval("SELECT staging_key FROM destinations")
    assert not await stored(context, staged)
    # The URL is still alive, and nothing is in its way, but where a token works once.
    once = place["kind"] == "http"
    assert await desk.send(place, SMALL) in ((403,) if once else (200, 201))
    assert await stored(context, staged) != once
    await context.db.execute("UPDATE deletions SET due_at = now()")
    await reap.reap(context)
    assert not await stored(context, staged)
    assert await context.db.fetchval("SELECT count(*) FROM deletions") == 0


async def test_parts(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, new(LARGE))
    (place,) = ticket["destinations"]
    assert (place["part_size"], place["part_count"], len(place["parts"])) == (5 * MEBIBYTE, 3, 3)
    await send_parts(desk, place, LARGE, skip=2)
    with pytest.raises(errors.NotUploaded) as caught:
        await commits.commit(context, ME, UUID(ticket["id"]), said(LARGE))
    assert caught.value.extra["missing"] == [2]
    refreshed = await upload.refresh_upload(context, ME, UUID(ticket["id"]))
    assert [part["number"] for part in refreshed["destinations"][0]["parts"]] == [2]
    assert [seen["number"] for seen in (await upload.upload_state(context, ME, UUID(ticket["id"])))["places"][0]["seen"]] == [1, 3]
    await send_parts(desk, refreshed["destinations"][0], LARGE)
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said_by_parts(LARGE, place))
    key = answer["replica"]["key"]
    assert await desk.fetch(context, place["store"], key) == LARGE
    again = await commits.commit(context, ME, UUID(ticket["id"]), said(LARGE))
    assert again == answer
    # Invariant 14: a part's URL, still alive, with other bytes.
    await desk.send(place["parts"][0], bytes(5 * MEBIBYTE))
    await context.db.execute("UPDATE deletions SET due_at = now()")
    await reap.reap(context)
    assert await desk.fetch(context, place["store"], key) == LARGE
    row = await context.db.fetchrow("SELECT staging_key, multipart_id FROM destinations")
    assert row is not None
    with contextlib.suppress(errors.Gone):
        assert list(await context.memory.driver(place["store"]).parts(row["staging_key"], row["multipart_id"])) == []


async def test_size_and_digests_told_at_the_end(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, {"operation": "upload", "image": {"name": "i"}})
    (place,) = ticket["destinations"]
    step = place["part_size"]
    assert "part_count" not in place and step == 20 * MEBIBYTE
    content = LARGE + LARGE
    request = {"numbers": [1, 2], "size": len(content), "digests": {"1": {"md5": digests(content[:step])["md5"]}}}
    await send_parts(desk, await upload.sign_parts(context, ME, UUID(ticket["id"]), request), content)
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said_by_parts(content, place))
    assert answer["blob"]["size"] == len(content) and answer["blob"]["digests"] == digests(content)
    assert await desk.fetch(context, place["store"], answer["replica"]["key"]) == content


@pytest.mark.parametrize("content", [SMALL[::-1], SMALL + b"!"], ids=["digest", "size"])
async def test_a_mismatch_is_refused_and_removed(desk: Desk, context: Context, content: bytes) -> None:
    """Nothing was declared at the start, so no store can refuse the bytes: the commit has to see it."""
    ticket = await upload.upload(context, ME, {"operation": "upload", "image": {"name": "i"}, "size": len(content)})
    (place,) = ticket["destinations"]
    assert await desk.send(place, content) in (200, 201)
    declared = said(SMALL, size=len(content))
    with pytest.raises(errors.Mismatch):
        await commits.commit(context, ME, UUID(ticket["id"]), declared)
    await reap.reap(context)
    for staged, final in await context.db.fetch("SELECT staging_key, final_key FROM destinations"):
        assert not await stored(context, staged) and not await stored(context, final)
    assert await context.db.fetchval("SELECT count(*) FROM replicas") == 0


async def test_parts_that_differ_are_refused_and_the_multipart_upload_is_gone(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, {"operation": "upload", "image": {"name": "i"}, "size": len(LARGE)})
    (place,) = ticket["destinations"]
    await send_parts(desk, place, LARGE[::-1])
    with pytest.raises(errors.Mismatch):
        await commits.commit(context, ME, UUID(ticket["id"]), said_by_parts(LARGE, place))
    await reap.reap(context)
    await check_multipart_is_gone(context)


async def test_an_abandoned_upload_is_gone_from_the_store(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, new(LARGE))
    await send_parts(desk, ticket["destinations"][0], LARGE, skip=2)
    small = await upload.upload(context, ME, new(SMALL))
    assert await desk.send(small["destinations"][0], SMALL) in (200, 201)
    await context.db.execute("UPDATE uploads SET expires_at = now()")
    await reap.reap(context)
    await check_multipart_is_gone(context)
    for (key,) in await context.db.fetch("SELECT staging_key FROM destinations"):
        assert not await stored(context, key)
    assert await context.db.fetchval("SELECT sum(taken) FROM spaces") == 0
    assert await context.db.fetchval("SELECT count(*) FROM images") == 0


async def check_multipart_is_gone(context: Context) -> None:
    """The store has no part of it any more."""
    row = await context.db.fetchrow("SELECT staging_key, multipart_id FROM destinations WHERE multipart_id IS NOT NULL")
    assert row is not None
    (name,) = context.memory.stores()
    with contextlib.suppress(errors.Gone):
        assert list(await context.memory.driver(name).parts(row["staging_key"], row["multipart_id"])) == []
    assert not await stored(context, row["staging_key"])


async def test_two_brokers_commit_at_once(desk: Desk, context: Context) -> None:
    other = await desk.broker(**IN_PARTS)
    for content in (SMALL, LARGE):
        ticket = await upload.upload(context, ME, new(content))
        (place,) = ticket["destinations"]
        if "parts" in place:
            await send_parts(desk, place, content)
            declared = said_by_parts(content, place)
        else:
            assert await desk.send(place, content) in (200, 201)
            declared = said(content)
        answers = await asyncio.gather(*(commits.commit(broker, ME, UUID(ticket["id"]), declared) for broker in (context, other, context)))
        assert answers[0] == answers[1] == answers[2]
        assert await desk.fetch(other, place["store"], answers[0]["replica"]["key"]) == content
    assert await context.db.fetchval("SELECT count(*) FROM replicas") == 2


async def test_known_content_is_linked_where_the_store_computed_the_digest(desk: Desk, context: Context) -> None:
    ticket = await upload.upload(context, ME, new(SMALL))
    await desk.send(ticket["destinations"][0], SMALL)
    done = await commits.commit(context, ME, UUID(ticket["id"]), said(SMALL))
    again = await upload.upload(context, ME, new(SMALL))
    if "sha256" in done["replica"]["observed"]["strength"]:
        assert again["known"] and again["blob"]["id"] == done["blob"]["id"]
    else:  # Swift knows MD5 only, which proves nothing to a stranger
        assert again["destinations"] and again["blob"]["id"] != done["blob"]["id"]


async def test_a_part_beyond_the_declared_length_is_refused_or_seen(desk: Desk, context: Context) -> None:
    """A client that writes more than a part holds gets no further than the commit."""
    ticket = await upload.upload(context, ME, new(LARGE))
    (place,) = ticket["destinations"]
    await send_parts(desk, place, LARGE, skip=3)
    last = place["parts"][2]
    status = await desk.send(last, LARGE[last["offset"] :] + b"more")
    with pytest.raises((errors.Mismatch, errors.NotUploaded)):
        await commits.commit(context, ME, UUID(ticket["id"]), said_by_parts(LARGE, place))
    assert status not in (200, 201) or not context.memory.stores()[place["store"]].abilities.binds_length


async def test_part_urls_name_one_part_of_one_upload(context: Context) -> None:
    """Each URL is signed afresh for just that part (invariant 8)."""
    ticket = await upload.upload(context, ME, new(LARGE))
    (place,) = ticket["destinations"]
    assert len({part["url"] for part in place["parts"]}) == 3
    row = await context.db.fetchrow("SELECT staging_key, multipart_id, extract(epoch FROM urls_until)::float8 AS until FROM destinations")
    assert row is not None
    now = time.time()
    handle = context.memory.driver(place["store"]).sign_part(
        row["staging_key"], row["multipart_id"], PartWrite(1, 0, 5 * MEBIBYTE, now + 60), now
    )
    assert handle.method == "PUT"
    assert now < row["until"] <= now + context.policy.part_url_ttl_seconds + 1


async def test_a_multipart_upload_whose_id_got_lost_is_given_up(desk: Desk, seaweedfs: S3Part) -> None:
    """A broker that dies between the store's answer and the database leaves an upload that only the store knows."""
    await desk.seaweedfs(seaweedfs)
    context = await desk.broker(**IN_PARTS)
    driver = context.memory.driver("s3")
    assert isinstance(driver, FindsMultipart)
    ticket = await upload.upload(context, ME, new(LARGE))
    key = await context.db.fetchval("SELECT staging_key FROM destinations")
    lost = await driver.begin(key, len(LARGE), 5 * MEBIBYTE, {})
    assert lost in await driver.multiparts(key) and not await driver.multiparts(key[:-1])
    await upload.release_upload(context, ME, UUID(ticket["id"]))
    await context.db.execute("UPDATE deletions SET due_at = now()")
    await reap.reap(context)
    assert not await driver.multiparts(key)
