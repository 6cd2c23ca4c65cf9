"""Bytes that somebody else carries: committed as what the store says that it has, and given up when they do not get there."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from broker import errors
from broker.catalog import images
from broker.model import Image, ImageStatus, UploadState, Visibility, new_id
from broker.service import carried
from broker.service.carried import Carried
from broker.service.context import Context
from broker.stores.base import Limits
from tests.parts.desk import Desk, FakeStore, client, digests

ME = client()
CONTENT = b"the bytes of an image"


@pytest.fixture
async def store(desk: Desk) -> FakeStore:
    return await desk.fake()


@pytest.fixture
async def context(desk: Desk, store: FakeStore) -> Context:
    return await desk.broker()


@pytest.fixture
async def image(context: Context) -> UUID:
    """One that waits for its bytes."""
    id = new_id()
    wanted = Image(id, "i", "p", Visibility.PRIVATE, ImageStatus.QUEUED, {}, {}, subject="u", disk_format="raw", container_format="bare")
    async with context.db.acquire() as connection:
        await images.insert(connection, wanted)
    return id


async def begin(context: Context, image: UUID, **more: Any) -> Carried:
    return await carried.begin(context, ME, image, {"format": "raw"}, **more)


async def status(context: Context, image: UUID) -> str:
    found = await images.get(context.db, image)
    assert found is not None
    return await carried.progress(context, image) or found.status.value


async def states(context: Context) -> list[str]:
    return [row["state"] for row in await context.db.fetch("SELECT state FROM uploads ORDER BY id")]


async def test_what_the_store_says_is_what_the_image_has(context: Context, store: FakeStore, image: UUID) -> None:
    place = await begin(context, image)
    assert await status(context, image) == "saving"
    store.put(place.url, CONTENT)
    await carried.finish(context, place.ticket)
    assert await status(context, image) == "active"
    blob = await context.db.fetchrow("SELECT size, digests FROM blobs")
    assert blob is not None and (blob["size"], blob["digests"]) == (len(CONTENT), digests(CONTENT))
    assert await context.db.fetchval("SELECT observed_by || ' ' || observed_strength FROM replicas") == "broker sha256,md5"
    await carried.finish(context, place.ticket)  # the answer may have got lost
    await carried.fail(context, place.ticket, "client")
    assert await status(context, image) == "active"


async def test_large_things_go_in_one_put(context: Context, image: UUID) -> None:
    place = await carried.begin(context, ME, image, {"format": "raw", "size": context.policy.single_put_limit * 4})
    assert place.url.count("&") == 0


async def test_what_is_too_large_for_one_put_is_refused(context: Context, store: FakeStore, image: UUID) -> None:
    store.limits = Limits(max_put=1000, min_part=1, max_part=1000, max_parts=1000, max_object=1 << 40)
    place = await carried.begin(context, ME, image, {"format": "raw", "size": 1000})
    await carried.fail(context, place.ticket, "edge")
    with pytest.raises(errors.TooLarge):
        await carried.begin(context, ME, image, {"format": "raw", "size": 1001})


async def test_a_ticket_is_good_for_its_upload_alone(context: Context, image: UUID) -> None:
    place = await begin(context, image)
    id, _, secret = place.ticket.partition(".")
    for wrong in ("", ".", id, f"{id}.", f"{id}.{secret}x", f"{new_id()}.{secret}", f"x.{secret}", "\u00e9"):
        with pytest.raises(errors.NotFound):
            await carried.finish(context, wrong)
        with pytest.raises(errors.NotFound):
            await carried.fail(context, wrong, "edge")
    assert secret.encode() not in await context.db.fetchval("SELECT carrier FROM uploads")
    assert await status(context, image) == "saving"


async def test_nothing_at_the_store_is_no_image(context: Context, image: UUID) -> None:
    place = await begin(context, image)
    with pytest.raises(errors.NotUploaded):
        await carried.finish(context, place.ticket)
    assert (await states(context), await status(context, image)) == (["abandoned"], "queued")


async def test_another_size_than_told_is_refused(context: Context, store: FakeStore, image: UUID) -> None:
    place = await begin(context, image)
    store.put(place.url, CONTENT)
    with pytest.raises(errors.Mismatch):
        await carried.finish(context, place.ticket, len(CONTENT) + 1)
    assert (await states(context), await status(context, image)) == ([UploadState.FAILED], "queued")


async def test_a_store_that_is_away_may_be_asked_again(context: Context, store: FakeStore, image: UUID) -> None:
    place = await begin(context, image)
    store.put(place.url, CONTENT)
    store.broken.add("stat")
    with pytest.raises(errors.StoreUnavailable):
        await carried.finish(context, place.ticket)
    store.broken.clear()
    await carried.finish(context, place.ticket)
    assert await status(context, image) == "active"


@pytest.mark.parametrize(("by", "after"), [("client", "saving"), ("edge", "queued"), ("store", "queued")])
async def test_who_failed(context: Context, image: UUID, by: str, after: str) -> None:
    place = await begin(context, image)
    await carried.fail(context, place.ticket, by)
    assert await status(context, image) == after
    if by == "client":
        with pytest.raises(errors.Conflict):
            await begin(context, image)
        left = await context.db.fetchval("SELECT extract(epoch FROM expires_at - now())::float8 FROM uploads")
        assert left <= carried.PAUSE_SECONDS
        await context.db.execute("UPDATE uploads SET expires_at = now()")
    assert await context.db.fetchval("SELECT count(*) FROM reports WHERE outcome = 'failed'") == (by == "store")
    if by == "store":
        with pytest.raises(errors.NoDestination):  # for a while this client is not sent there again
            await begin(context, image)
    else:
        await begin(context, image)


async def test_staged_bytes_wait_for_their_import(context: Context, store: FakeStore, image: UUID) -> None:
    with pytest.raises(errors.NotFound):
        await carried.import_staged(context, ME, image)
    place = await begin(context, image, staged=True)
    with pytest.raises(errors.NotUploaded):
        await carried.finish(context, place.ticket)
    place = await begin(context, image, staged=True)
    store.put(place.url, CONTENT)
    await carried.finish(context, place.ticket, len(CONTENT))
    assert await status(context, image) == "uploading"
    with pytest.raises(errors.NotFound):
        await carried.import_staged(context, client("other"), image)
    await carried.import_staged(context, ME, image)
    assert await status(context, image) == "active"


async def test_another_size_is_refused_when_it_is_staged(context: Context, store: FakeStore, image: UUID) -> None:
    for sent, told in ((CONTENT, len(CONTENT) + 1), (b"", None)):
        place = await begin(context, image, staged=True)
        store.put(place.url, sent)
        with pytest.raises((errors.Mismatch, errors.Invalid)):
            await carried.finish(context, place.ticket, told)
        assert await status(context, image) == "queued"


async def test_only_who_may_write_the_image(context: Context, image: UUID) -> None:
    with pytest.raises(errors.NotFound):
        await carried.begin(context, client("other"), image, {"format": "raw"})
    with pytest.raises(errors.NotFound):
        await carried.begin(context, ME, new_id(), {"format": "raw"})
