"""Uploads over the whole service on a real database, at a store that can be broken where it hurts (invariants 4, 7, 11, 14)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from importlib import resources
from typing import Any
from uuid import UUID

import jsonschema_rs
import orjson
import pytest

from broker import errors
from broker.catalog import deletions, uploads
from broker.model import Abilities, Exposure, Role, new_id
from broker.service import commit as commits
from broker.service import reap, signals, upload
from broker.service.context import Context
from tests.parts.desk import STRONG, Desk, FakeStore, client, digests

ME = client()
CONTENT = b"boot" * 1000
OTHER = b"toob" * 1000


def new(content: bytes | None = CONTENT, **fields: Any) -> dict[str, Any]:
    """A request for a new image."""
    declared = {} if content is None else {"size": len(content), "digests": digests(content)}
    return {"operation": "upload", "image": {"name": "cirros"}, "format": "qcow2", **declared, **fields}


def said(content: bytes = CONTENT, **fields: Any) -> dict[str, Any]:
    """A commit of `content`."""
    return {"size": len(content), "digests": digests(content), **fields}


async def put(context: Context, store: FakeStore, content: bytes = CONTENT, **fields: Any) -> dict[str, Any]:
    """Ask for a ticket and write the bytes."""
    ticket = await upload.upload(context, ME, new(content, **fields))
    store.put(ticket["destinations"][0]["url"], content)
    return ticket


async def taken(context: Context) -> int:
    return int(await context.db.fetchval("SELECT sum(taken) FROM spaces"))


async def let_expire(context: Context) -> None:
    await context.db.execute("UPDATE uploads SET expires_at = now() - interval '1 second' WHERE state IN ('open', 'committing')")


async def all_due(context: Context) -> None:
    await context.db.execute("UPDATE deletions SET due_at = now() - interval '1 second'")


async def test_a_single_upload_becomes_an_active_image_with_a_verified_sealed_replica(desk: Desk) -> None:
    store = await desk.fake(capacity=10_000)
    context = await desk.broker()
    ticket = await put(context, store)
    assert await taken(context) == len(CONTENT)
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said())
    assert answer["state"] == "committed" and answer["replica"]["state"] == "active"
    assert answer["replica"]["observed"]["strength"] == "sha256,md5"
    key = answer["replica"]["key"]
    assert store.objects[key] == CONTENT and f"http://fake/{key}" != ticket["destinations"][0]["url"]
    assert await context.db.fetchval("SELECT status FROM images WHERE id = $1", UUID(ticket["image"])) == "active"
    assert await taken(context) == len(CONTENT)
    # The write URL lives on, the accepted bytes do not change, and what it wrote is removed when it has expired.
    store.put(ticket["destinations"][0]["url"], OTHER)
    await all_due(context)
    await reap.reap(context)
    assert store.objects == {key: CONTENT}


async def test_a_commit_that_nobody_reports_on_counts_as_a_report_a_minute_later(desk: Desk) -> None:
    """From the ticket until the client first said that everything is there, whatever the commit then took."""
    store = await desk.fake()
    context = await desk.broker()
    content = b"boot" * 500_000
    ticket = UUID((await put(context, store, content))["id"])
    store.broken = {"seal"}
    with pytest.raises(errors.StoreUnavailable):
        await commits.commit(context, ME, ticket, said(content))
    await context.db.execute("UPDATE uploads SET created_at = created_at - interval '1 hour', sent_at = sent_at - interval '3590 seconds'")
    store.broken = set()
    await commits.commit(context, ME, ticket, said(content))
    await context.db.execute("UPDATE watermarks SET at = now() - interval '10 minutes'")
    assert (await signals.look_back(context))["committed"] == 0, "a report may come yet"
    await context.db.execute("UPDATE uploads SET touched_at = now() - interval '2 minutes'")
    await context.db.execute("UPDATE watermarks SET at = now() - interval '10 minutes'")
    assert (await signals.look_back(context))["committed"] == 1
    weight, good, bytes, seconds = await context.db.fetchrow(
        "SELECT weight, good, bytes, busy_seconds FROM paths WHERE direction = 'write'"
    )
    assert (weight, good) == (pytest.approx(0.5), pytest.approx(0.5))
    assert bytes / seconds == pytest.approx(len(content) / 10, rel=0.5)


async def test_a_commit_again_and_two_at_once_give_one_answer(desk: Desk) -> None:
    store = await desk.fake()
    one, two = await desk.broker(), await desk.broker()
    ticket = UUID((await put(one, store))["id"])
    first, second = await asyncio.gather(commits.commit(one, ME, ticket, said()), commits.commit(two, ME, ticket, said()))
    assert first == second == await commits.commit(one, ME, ticket, said())
    assert await one.db.fetchval("SELECT count(*) FROM replicas") == 1
    assert store.calls.count("seal") == 1
    with pytest.raises(errors.Conflict):
        await commits.commit(one, ME, ticket, said(OTHER))


@pytest.mark.parametrize("what", ["stat", "seal"])
async def test_a_store_that_is_down_leaves_the_upload_open(desk: Desk, what: str) -> None:
    store = await desk.fake()
    context = await desk.broker()
    ticket = UUID((await put(context, store))["id"])
    store.broken = {what}
    with pytest.raises(errors.StoreUnavailable):
        await commits.commit(context, ME, ticket, said())
    assert (await upload.upload_state(context, ME, ticket))["state"] == "open"
    store.broken = set()
    assert (await commits.commit(context, ME, ticket, said()))["state"] == "committed"


async def test_a_committer_that_died_after_sealing_is_taken_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await desk.fake()
    context = await desk.broker()
    ticket = UUID((await put(context, store))["id"])

    class Killed(BaseException):
        """As kill -9: nothing is cleaned up."""

    async def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(commits, "_settle", die)
        patch.setattr(uploads, "reopen", die)
        with pytest.raises(Killed):
            await commits.commit(context, ME, ticket, said())
    assert await context.db.fetchval("SELECT state FROM uploads") == "committing"
    await context.db.execute("UPDATE uploads SET touched_at = now() - interval '1 hour'")
    answer = await commits.commit(context, ME, ticket, said())
    await all_due(context)
    await reap.reap(context)
    assert store.objects == {answer["replica"]["key"]: CONTENT}


async def test_a_superseded_committer_changes_nothing(desk: Desk) -> None:
    """The first committer hangs at the store until the second one is through, then goes on with other bytes in staging."""
    store = await desk.fake()
    slow, quick = await desk.broker(), await desk.broker()
    ticket = await put(slow, store)
    id = UUID(ticket["id"])
    at_seal, go_on = asyncio.Event(), asyncio.Event()

    async def hang(name: str) -> None:
        if name == "seal" and not at_seal.is_set():
            at_seal.set()
            await go_on.wait()

    store.before = hang
    first = asyncio.create_task(commits.commit(slow, ME, id, said()))
    await at_seal.wait()
    await quick.db.execute("UPDATE uploads SET touched_at = now() - interval '1 hour'")
    second = await commits.commit(quick, ME, id, said())
    store.put(ticket["destinations"][0]["url"], OTHER)
    go_on.set()
    assert (await first)["replica"] == second["replica"]
    assert store.objects[second["replica"]["key"]] == CONTENT
    await all_due(quick)
    await reap.reap(quick)
    assert store.objects == {second["replica"]["key"]: CONTENT}


@pytest.mark.parametrize("content", [OTHER, CONTENT + b"!"])
async def test_what_differs_is_refused_removed_and_may_be_uploaded_again(desk: Desk, content: bytes) -> None:
    store = await desk.fake(capacity=100_000)
    context = await desk.broker()
    ticket = await upload.upload(context, ME, new())
    store.put(ticket["destinations"][0]["url"], content)
    with pytest.raises(errors.Mismatch) as caught:
        await commits.commit(context, ME, UUID(ticket["id"]), said())
    problem = caught.value.problem()
    assert problem["declared"]["size"] == len(CONTENT) and problem["observed"]["size"] == len(content)
    assert await taken(context) == 0
    await reap.reap(context)
    assert not store.objects
    assert await context.db.fetchval("SELECT count(*) FROM replicas") == 0
    with pytest.raises(errors.Gone):
        await commits.commit(context, ME, UUID(ticket["id"]), said())
    again = await upload.upload(context, ME, {"operation": "upload", "blob": ticket["blob"]["id"], "size": len(CONTENT)})
    assert again["image"] == ticket["image"] and again["id"] != ticket["id"]
    store.put(again["destinations"][0]["url"], CONTENT)
    await commits.commit(context, ME, UUID(again["id"]), said())
    assert await context.db.fetchval("SELECT status FROM images") == "active"


async def test_nothing_uploaded_and_nothing_provable(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    ticket = await upload.upload(context, ME, new(None, size=len(CONTENT)))
    id = UUID(ticket["id"])
    with pytest.raises(errors.NotUploaded):
        await commits.commit(context, ME, id, said())
    store.put(ticket["destinations"][0]["url"], CONTENT)
    with pytest.raises(errors.Unverifiable):
        await commits.commit(context, ME, id, {"size": len(CONTENT), "digests": {"sha1": "0" * 40}})
    assert (await commits.commit(context, ME, id, said()))["state"] == "committed"


async def test_what_was_declared_at_the_start_binds(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    ticket = UUID((await put(context, store))["id"])
    with pytest.raises(errors.Conflict) as caught:
        await commits.commit(context, ME, ticket, said(CONTENT + b"!"))
    assert caught.value.field == "size"
    with pytest.raises(errors.Conflict):
        await commits.commit(context, ME, ticket, said() | {"digests": digests(OTHER)})
    assert (await upload.upload_state(context, ME, ticket))["state"] == "open"


# -- in parts


PARTS = {"single_put_limit": 100, "min_part_size": 1000}


async def test_parts_are_signed_missing_ones_named_and_joined(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker(**PARTS, first_parts=2)
    ticket = await upload.upload(context, ME, new())
    id, place = UUID(ticket["id"]), ticket["destinations"][0]
    assert (place["part_size"], place["part_count"], [part["number"] for part in place["parts"]]) == (1000, 4, [1, 2])
    length = place["part_size"]
    store.put(place["parts"][0]["url"], CONTENT[:length])
    missing = list(range(2, place["part_count"] + 1))
    with pytest.raises(errors.NotUploaded) as caught:
        await commits.commit(context, ME, id, said())
    assert caught.value.extra["missing"] == missing
    refreshed = await upload.refresh_upload(context, ME, id)
    assert [part["number"] for part in refreshed["destinations"][0]["parts"]] == missing[:2]
    for part in (await upload.sign_parts(context, ME, id, {"numbers": missing}))["parts"]:
        store.put(part["url"], CONTENT[part["offset"] : part["offset"] + part["length"]])
    seen = (await upload.upload_state(context, ME, id))["places"][0]["seen"]
    assert sum(part["size"] for part in seen) == len(CONTENT)
    with pytest.raises(errors.Invalid):
        await upload.sign_parts(context, ME, id, {"numbers": [place["part_count"] + 1]})
    answer = await commits.commit(context, ME, id, said())
    assert store.objects[answer["replica"]["key"]] == CONTENT and not store.open


async def test_a_size_that_becomes_known_late_is_reserved_then(desk: Desk) -> None:
    store = await desk.fake(capacity=5000)
    context = await desk.broker(**PARTS)
    ticket = await upload.upload(context, ME, new(None))
    id = UUID(ticket["id"])
    assert await taken(context) == 0
    with pytest.raises(errors.NoDestination):
        await upload.sign_parts(context, ME, id, {"numbers": [1], "size": 5001})
    (part,) = (await upload.sign_parts(context, ME, id, {"numbers": [1], "size": 4000}))["parts"]
    assert part["length"] == 4000 and await taken(context) == 4000
    with pytest.raises(errors.Conflict):
        await upload.sign_parts(context, ME, id, {"numbers": [1], "size": 4001})
    store.put(part["url"], CONTENT)
    await commits.commit(context, ME, id, said())
    assert await taken(context) == 4000


async def test_a_multipart_committer_that_died_after_joining_is_taken_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await desk.fake()
    context = await desk.broker(**PARTS)
    ticket = await upload.upload(context, ME, new())
    id = UUID(ticket["id"])
    for part in ticket["destinations"][0]["parts"]:
        store.put(part["url"], CONTENT[part["offset"] : part["offset"] + part["length"]])

    async def unreachable(*_: Any) -> None:
        raise errors.Unavailable

    with monkeypatch.context() as patch:
        patch.setattr(commits, "_settle", unreachable)
        with pytest.raises(errors.Unavailable):
            await commits.commit(context, ME, id, said())
    assert not store.open
    answer = await commits.commit(context, ME, id, said())
    await all_due(context)
    await reap.reap(context)
    assert store.objects == {answer["replica"]["key"]: CONTENT}


# -- who may, and where


async def test_readers_strangers_and_publishers(desk: Desk) -> None:
    await desk.fake()
    context = await desk.broker()
    with pytest.raises(errors.Forbidden):
        await upload.upload(context, client(role=Role.READER), new())
    with pytest.raises(errors.Forbidden):
        await upload.upload(context, ME, new(image={"name": "x", "visibility": "public"}))
    ticket = await upload.upload(context, ME, new())
    for verb in (upload.upload_state, upload.refresh_upload, upload.release_upload):
        with pytest.raises(errors.NotFound):
            await verb(context, client(project="q"), UUID(ticket["id"]))
    with pytest.raises(errors.NotFound):
        await upload.upload(context, client(project="q"), {"operation": "upload", "image": ticket["image"], "format": "raw"})
    with pytest.raises(errors.NotFound):
        await upload.upload(context, client(project="q"), {"operation": "upload", "blob": ticket["blob"]["id"]})
    with pytest.raises(errors.Conflict):
        await upload.upload(context, ME, {"operation": "upload", "image": ticket["image"], "format": "qcow2"})


async def test_who_may_write_no_more_gets_nothing_more_of_an_upload(desk: Desk) -> None:
    """Else whoever lost the role could go on for as long as an upload can be kept alive."""
    store = await desk.fake()
    context = await desk.broker()
    single, parts = await put(context, store), await upload.upload(context, ME, new(None))
    reader = client(role=Role.READER)
    for ticket in map(UUID, (single["id"], parts["id"])):
        for verb in (
            upload.refresh_upload(context, reader, ticket),
            upload.sign_parts(context, reader, ticket, {"numbers": [1]}),
            upload.activate_destination(context, reader, ticket, {"store": "fake"}),
            upload.upload(context, reader, new(), ticket),
            commits.commit(context, reader, ticket, said()),
        ):
            with pytest.raises(errors.Forbidden):
                await verb
        assert (await upload.upload_state(context, reader, ticket))["state"] == "open"
    await upload.release_upload(context, reader, UUID(parts["id"]))
    assert (await commits.commit(context, ME, UUID(single["id"]), said()))["state"] == "committed"


async def test_private_stores_are_no_destination_and_no_reason(desk: Desk) -> None:
    await desk.fake("node", exposure=Exposure.SERVICE)
    await desk.fake("weak", Abilities(reads=True, writes=True, observes=("md5",)))
    context = await desk.broker()
    with pytest.raises(errors.NoDestination) as caught:
        await upload.upload(context, ME, new())
    assert caught.value.extra["excluded"] == [{"store": "weak", "reason": "cannot-seal"}]
    ticket = await upload.upload(context, client(role=Role.SERVICE), new())
    assert [place["store"] for place in ticket["destinations"]] == ["node"]


async def test_space_is_never_promised_twice(desk: Desk) -> None:
    await desk.fake(capacity=len(CONTENT) * 3)
    context = await desk.broker()
    results = await asyncio.gather(*(upload.upload(context, ME, new()) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(result, dict) for result in results) == 3
    assert all(isinstance(result, dict | errors.NoDestination) for result in results)
    assert await taken(context) == len(CONTENT) * 3
    assert await context.db.fetchval("SELECT count(*) FROM images") == 3


async def test_slots_are_leased_and_given_back(desk: Desk) -> None:
    store = await desk.fake(write_slots=1)
    context = await desk.broker()
    ticket = await put(context, store)
    with pytest.raises(errors.Busy) as caught:
        await upload.upload(context, ME, new(OTHER))
    assert caught.value.retry_after
    assert await context.db.fetchval("SELECT count(*) FROM uploads") == 1
    await commits.commit(context, ME, UUID(ticket["id"]), said())
    assert (await upload.upload(context, ME, new(OTHER)))["destinations"]


async def test_another_place_is_taken_when_the_first_is_down_and_by_choice(desk: Desk) -> None:
    down, up, third = await desk.fake("a"), await desk.fake("b"), await desk.fake("c")
    context = await desk.broker(**PARTS)
    down.broken = {"begin"}
    ticket = await upload.upload(context, ME, new(prefer=["a"], count=3))
    states = {place["store"]: place["state"] for place in ticket["destinations"]}
    assert states["a"] == "standby" and sorted(states.values()) == ["active", "standby", "standby"]
    other = "c" if states["b"] == "active" else "b"
    answer = await upload.activate_destination(context, ME, UUID(ticket["id"]), {"store": other})
    place = next(place for place in answer["destinations"] if place["store"] == other)
    chosen = {"b": up, "c": third}[other]
    for part in place["parts"]:
        chosen.put(part["url"], CONTENT[part["offset"] : part["offset"] + part["length"]])
    with pytest.raises(errors.Invalid):
        await commits.commit(context, ME, UUID(ticket["id"]), said())
    done = await commits.commit(context, ME, UUID(ticket["id"]), said(store=other))
    assert done["replica"]["store"] == other
    await reap.reap(context)
    assert not up.open and not third.open


async def test_the_same_request_again_is_the_same_ticket(desk: Desk) -> None:
    await desk.fake(write_slots=1, capacity=10_000)
    context = await desk.broker(**PARTS)
    id = new_id()
    tickets = await asyncio.gather(*(upload.upload(context, ME, new(), id) for _ in range(4)))
    assert {ticket["image"] for ticket in tickets} == {tickets[0]["image"]}
    assert await context.db.fetchval("SELECT count(*) FROM leases") == 1
    assert await taken(context) == len(CONTENT)
    await reap.reap(context)
    assert len(desk.fakes["fake"].open) == 1


async def test_the_same_request_for_a_format_or_for_known_content_again(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    done = await committed(context, store)
    for content in (OTHER, CONTENT):
        id, fmt = new_id(), f"f{len(content)}-{content[:1].decode()}"
        request = new(content, image=done["image"], format=fmt)
        tickets = await asyncio.gather(*(upload.upload(context, ME, request, id) for _ in range(4)))
        assert {ticket["id"] for ticket in tickets} == {str(id)} and len({ticket["blob"]["id"] for ticket in tickets}) == 1
        assert await context.db.fetchval("SELECT count(*) FROM tickets WHERE id = $1", id) == 1
        with pytest.raises(errors.Conflict):
            await upload.upload(context, ME, request, new_id())


# -- one more replica, known content


async def committed(context: Context, store: FakeStore, who: Any = ME, **fields: Any) -> dict[str, Any]:
    ticket = await upload.upload(context, who, new(**fields))
    store.put(ticket["destinations"][0]["url"], CONTENT)
    return await commits.commit(context, who, UUID(ticket["id"]), said())


async def test_one_more_replica_must_be_the_same_bytes(desk: Desk) -> None:
    first, second = await desk.fake("a"), await desk.fake("b")
    context = await desk.broker()
    done = await committed(context, first, only=["a"])
    request = {"operation": "upload", "blob": done["blob"]["id"], "purpose": "cache"}
    with pytest.raises(errors.Conflict):
        await upload.upload(context, ME, request | {"size": 1})
    ticket = await upload.upload(context, ME, request)
    assert {"store": "a", "reason": "has-replica"} in ticket["excluded"] and ticket["destinations"][0]["store"] == "b"
    second.put(ticket["destinations"][0]["url"], CONTENT)
    with pytest.raises(errors.Conflict):
        await commits.commit(context, ME, UUID(ticket["id"]), said(CONTENT + b"!"))
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said())
    assert answer["replica"]["purpose"] == "cache" and answer["blob"]["id"] == done["blob"]["id"] and "image" not in answer


async def test_known_content_needs_no_bytes_for_those_who_may_read_it(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    done = await committed(context, store)
    ticket = await upload.upload(context, ME, new())
    assert ticket["known"] and ticket["state"] == "committed" and ticket["destinations"] == []
    assert ticket["blob"]["id"] == done["blob"]["id"] and ticket["image"] != done["image"]
    again = await upload.refresh_upload(context, ME, UUID(ticket["id"]))
    assert again["known"] and (await commits.commit(context, ME, UUID(ticket["id"]), said()))["replica"] == done["replica"]
    stranger = client(project="q")
    ordinary, unknown = await upload.upload(context, stranger, new()), await upload.upload(context, stranger, new(OTHER))
    assert ordinary.keys() == unknown.keys() and ordinary["destinations"] and ordinary["blob"]["id"] != done["blob"]["id"]
    assert ordinary["destinations"][0].keys() == unknown["destinations"][0].keys()


async def test_a_claim_that_no_store_confirmed_makes_nothing_known(desk: Desk) -> None:
    """Else a liar's blob would be given to those who declare the true bytes."""
    enforcing = Abilities(reads=True, writes=True, refuses_tampering=True, refuses_expired=True)
    store = await desk.fake(abilities=replace(enforcing, observes=("md5",), copies=True))
    context = await desk.broker()
    store._seen = lambda content: type(FakeStore._seen(store, content))(  # type: ignore[method-assign]
        len(content), time.time(), "broker", {"md5": digests(content)["md5"]}
    )
    lie = {"md5": digests(OTHER)["md5"], "sha256": digests(CONTENT)["sha256"]}
    ticket = await upload.upload(context, ME, new(None, size=len(OTHER), digests=lie))
    store.put(ticket["destinations"][0]["url"], OTHER)
    await commits.commit(context, ME, UUID(ticket["id"]), {"size": len(OTHER), "digests": lie})
    honest = await upload.upload(context, ME, new(None, size=len(CONTENT), digests={"sha256": digests(CONTENT)["sha256"]}))
    assert "known" not in honest and honest["destinations"]


# -- the end of it


async def test_abandoned_uploads_are_reaped_whole(desk: Desk) -> None:
    store = await desk.fake(write_slots=4, capacity=100_000)
    context = await desk.broker(**PARTS)
    ticket = await upload.upload(context, ME, new())
    single = await desk.broker()
    other = await put(single, store, b"x" * 50)
    assert store.open and store.objects and await taken(context) == len(CONTENT) + 50
    await let_expire(context)
    await asyncio.gather(reap.reap(context), reap.reap(single))
    assert not store.open and not store.objects and await taken(context) == 0
    assert await context.db.fetchval("SELECT count(*) FROM images") == 0
    assert await context.db.fetchval("SELECT count(*) FROM leases") == 0
    with pytest.raises(errors.Gone):
        await commits.commit(context, ME, UUID(ticket["id"]), said())
    # The URL is used once more before it expires: what it leaves is removed too.
    store.put(other["destinations"][0]["url"], b"late")
    await all_due(context)
    await reap.reap(context)
    assert not store.objects and await context.db.fetchval("SELECT count(*) FROM deletions") == 0
    await context.db.execute("UPDATE uploads SET touched_at = now() - interval '30 days'")
    await reap.reap(context)
    assert await context.db.fetchval("SELECT (SELECT count(*) FROM uploads) + (SELECT count(*) FROM blobs)") == 0


async def test_a_released_upload_ends_at_once_and_a_committed_one_stays(desk: Desk) -> None:
    store = await desk.fake(capacity=100_000)
    context = await desk.broker()
    ticket = await put(context, store)
    await upload.release_upload(context, ME, UUID(ticket["id"]))
    await upload.release_upload(context, ME, UUID(ticket["id"]))
    assert await taken(context) == 0 and (await upload.upload_state(context, ME, UUID(ticket["id"])))["state"] == "abandoned"
    done = await committed(context, store)
    await upload.release_upload(context, ME, UUID(done["id"]))
    await reap.reap(context)
    assert store.objects == {done["replica"]["key"]: CONTENT}


async def test_activity_prolongs_an_upload_within_bounds(desk: Desk) -> None:
    await desk.fake()
    context = await desk.broker(**PARTS, upload_ttl_seconds=100.0)
    ticket = await upload.upload(context, ME, new())
    await context.db.execute("UPDATE uploads SET created_at = now() - interval '650 seconds', expires_at = now() + interval '10 seconds'")
    await upload.sign_parts(context, ME, UUID(ticket["id"]), {"numbers": [1]})
    left = await context.db.fetchval("SELECT extract(epoch FROM expires_at - now())::float8 FROM uploads")
    assert 40 < left < 55


async def test_nothing_that_a_replica_counts_on_is_ever_deleted(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    done = await committed(context, store)
    store_id = await context.db.fetchval("SELECT store_id FROM replicas")
    await deletions.schedule(context.db, store_id, done["replica"]["key"], reason="a mistake")
    await reap.reap(context)
    assert store.objects[done["replica"]["key"]] == CONTENT


async def test_deletions_are_tried_until_they_succeed(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    store.objects["k"] = b"x"
    store_id = await context.db.fetchval("SELECT id FROM stores")
    await context.db.execute("UPDATE spaces SET taken = 5")
    await deletions.schedule(context.db, store_id, "k", frees=3, reason="test")
    store.broken = {"delete"}
    await reap.reap(context)
    row = await context.db.fetchrow("SELECT attempts, problem, due_at > now() AS later FROM deletions")
    assert row is not None
    assert row["attempts"] == 1 and "down" in row["problem"] and row["later"]
    store.broken = set()
    await all_due(context)
    await reap.reap(context)
    assert not store.objects and await taken(context) == 2
    assert reap.backoff(1) == 10.0 and reap.backoff(40) == 3600.0


# -- the contract


def conforms(schema: str, body: dict[str, Any]) -> None:
    """Raise unless `body` is what openapi.json says of `schema`."""
    contract = orjson.loads(resources.files("broker.schemas").joinpath("openapi.json").read_bytes())
    jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{schema}", "components": contract["components"]}).validate(
        orjson.loads(orjson.dumps(body))
    )


async def test_a_store_that_enforces_nothing_takes_uploads_only_when_its_operator_says_so(desk: Desk) -> None:
    lax = replace(STRONG, refuses_tampering=False)
    await desk.fake("lax", lax)
    await desk.fake("late", replace(STRONG, refuses_expired=False))
    await desk.fake("allowed", lax, settings={"weak_uploads": "allowed"})
    context = await desk.broker()
    ticket = await upload.upload(context, ME, new(count=3))
    assert [place["store"] for place in ticket["destinations"]] == ["allowed"]
    assert {entry["store"]: entry["reason"] for entry in ticket["excluded"]} == {"lax": "unenforced", "late": "unenforced"}


@pytest.mark.parametrize("policy", [{}, PARTS], ids=["single", "parts"])
@pytest.mark.parametrize("content", [CONTENT, None], ids=["declared", "undeclared"])
async def test_every_answer_is_as_the_contract_says(desk: Desk, policy: dict[str, Any], content: bytes | None) -> None:
    store = await desk.fake()
    await desk.fake("weak", Abilities(reads=True, writes=True, observes=("md5",)))
    await desk.fake("other", enabled=False)
    context = await desk.broker(**policy)
    ticket = await upload.upload(context, ME, new(content, count=3))
    id = UUID(ticket["id"])
    assert {entry["store"]: entry["reason"] for entry in ticket["excluded"]} == {"weak": "cannot-seal", "other": "disabled"}
    conforms("Ticket", ticket)
    if "parts" in ticket["destinations"][0]:
        signed = await upload.sign_parts(context, ME, id, {"numbers": [1], "size": len(CONTENT)})
        conforms("PartsAnswer", signed)
        ticket = await upload.refresh_upload(context, ME, id)
        conforms("Ticket", ticket)
        for part in ticket["destinations"][0]["parts"]:
            store.put(part["url"], CONTENT[part["offset"] : part["offset"] + part["length"]])
    else:
        store.put(ticket["destinations"][0]["url"], CONTENT)
    conforms("TicketState", await upload.upload_state(context, ME, id))
    conforms("CommitAnswer", await commits.commit(context, ME, id, said()))
    conforms("TicketState", await upload.upload_state(context, ME, id))
    conforms("Ticket", await upload.refresh_upload(context, ME, id))
    known = await upload.upload(context, ME, new())
    conforms("Ticket", known)
    failing = await upload.upload(context, client(project="q"), new(None, size=5))
    conforms("Ticket", failing)
    with pytest.raises(errors.NotUploaded) as missing:
        await commits.commit(context, client(project="q"), UUID(failing["id"]), said(b"12345"))
    conforms("Problem", missing.value.problem())
    for part in failing["destinations"][0].get("parts", [failing["destinations"][0]]):
        store.put(part["url"], b"54321")
    with pytest.raises((errors.Mismatch, errors.Unverifiable)) as refused:
        await commits.commit(context, client(project="q"), UUID(failing["id"]), said(b"12345"))
    conforms("Problem", refused.value.problem())


async def test_another_project_learns_no_key_from_known_content(desk: Desk) -> None:
    store = await desk.fake()
    context = await desk.broker()
    admin = client(project="ops", role=Role.ADMIN)
    done = await committed(context, store, admin, image={"name": "vetted", "visibility": "public"})
    assert "key" in done["replica"]
    ticket = await upload.upload(context, ME, new())
    answer = await commits.commit(context, ME, UUID(ticket["id"]), said())
    assert ticket["known"] and answer["blob"]["id"] == done["blob"]["id"] and "key" not in answer["replica"]
