"""A broker that is killed at any point leaves every upload resumable or reaped (invariant 11).

The broker dies before the nth thing that it does outside of its own head: each call of the catalogue and of the store. What
a transaction had not committed is rolled back, as when its connection breaks. Then another broker goes on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from broker.catalog import blobs, deletions, images, leases, replicas, tickets, upload_ends, uploads, views
from broker.model import new_id
from broker.service import commit as commits
from broker.service import reap, upload
from tests.parts.desk import Desk, FakeStore, client, digests

ME = client()
CONTENT = b"boot" * 1000
REQUEST = {"operation": "upload", "image": {"name": "i"}, "size": len(CONTENT), "digests": digests(CONTENT)}
COMMIT = {"size": len(CONTENT), "digests": digests(CONTENT)}


# Row by row, since a table that is truncated is a file made anew; without triggers, which would keep books on it.
EMPTIED = (
    "lfs_objects", "former_images", "image_verdicts", "image_members", "copies", "replicas", "image_blobs", "images", "destinations",
    "uploads", "leases", "tickets", "blobs",
)  # fmt: skip
EMPTY = "BEGIN; SET LOCAL session_replication_role = replica; " + "".join(f"DELETE FROM {table}; " for table in EMPTIED) + "COMMIT"


class Killed(BaseException):
    """As kill -9: no clean-up of ours is run to any effect, since every further call dies too."""


class Life:
    """Counts what a broker does; it dies before the one numbered `last`."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.done = 0

    def step(self) -> None:
        self.done += 1
        if self.done > self.last:
            raise Killed


def mortal(patch: pytest.MonkeyPatch, life: Life, store: FakeStore) -> None:
    """Let everything that the service calls take a step of this life, before and after."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **keywords: Any) -> Any:
            life.step()
            result = await function(*args, **keywords)
            life.step()
            return result

        return call

    for module in (blobs, deletions, images, leases, replicas, tickets, upload_ends, uploads, views):
        for name, function in inspect.getmembers(module, inspect.iscoroutinefunction):
            if not name.startswith("_") and function.__module__ == module.__name__ and name != "grant":
                patch.setattr(module, name, wrapped(function))
    for name in ("stat", "seal", "begin", "parts", "finish"):
        patch.setattr(store, name, wrapped(getattr(store, name)))


async def write(store: FakeStore, ticket: dict[str, Any]) -> None:
    """What the client does."""
    (place,) = ticket["destinations"]
    for part in place.get("parts", [{"url": place.get("url"), "offset": 0, "length": len(CONTENT)}]):
        store.put(part["url"], CONTENT[part["offset"] : part["offset"] + part["length"]])


@pytest.mark.parametrize("policy", [{}, {"single_put_limit": 100, "min_part_size": 1000}], ids=["single", "parts"])
@pytest.mark.parametrize("goes_on", [True, False], ids=["resumed", "reaped"])
async def test_killed_anywhere(desk: Desk, policy: dict[str, Any], goes_on: bool) -> None:
    store = await desk.fake(write_slots=1, capacity=len(CONTENT))
    context, after = await desk.broker(**policy), await desk.broker(**policy)
    db = context.db
    last, finished = 0, False
    while not finished:
        id, life = new_id(), Life(last)
        ticket: dict[str, Any] | None = None
        with pytest.MonkeyPatch.context() as patch:
            mortal(patch, life, store)
            try:
                ticket = await upload.upload(context, ME, REQUEST, id)
                await write(store, ticket)
                answer = await commits.commit(context, ME, UUID(ticket["id"]), COMMIT)
                finished = True
            except Killed:
                pass
        await db.execute("UPDATE uploads SET touched_at = now() - interval '1 hour' WHERE state = 'committing'")
        if goes_on or finished:
            # The client sends the same requests again, to whichever broker.
            if ticket is None:
                ticket = await upload.upload(after, ME, REQUEST, id)
                await write(store, ticket)
            answer = await commits.commit(after, ME, id, COMMIT)
            assert store.objects[answer["replica"]["key"]] == CONTENT, last
            assert await db.fetchval("SELECT taken FROM spaces") == len(CONTENT), last
            kept = {answer["replica"]["key"]: CONTENT}
        else:
            await db.execute("UPDATE uploads SET expires_at = now() - interval '1 second'")
            kept = {row["key"]: CONTENT for row in await db.fetch("SELECT key FROM replicas")}
            assert bool(kept) == (await db.fetchval("SELECT count(*) FROM uploads WHERE state = 'committed'") == 1), last
        await db.execute("UPDATE leases SET expires_at = now() - interval '1 second'")
        await reap.reap(after)
        await db.execute("UPDATE deletions SET due_at = now() - interval '1 second'")
        await reap.reap(after)
        assert store.objects == kept and not store.open, last
        assert await db.fetchval("SELECT taken FROM spaces") == sum(map(len, kept.values())), last
        assert await db.fetchval("SELECT leased FROM slots WHERE direction = 'write'") == 0, last
        assert await db.fetchval("SELECT count(*) FROM deletions") == 0, last
        assert await db.fetchval("SELECT count(*) FROM images") == len(kept), last
        await db.execute(EMPTY)
        await db.execute("UPDATE spaces SET taken = 0")
        store.objects.clear()
        last += 1
    assert last > 20
