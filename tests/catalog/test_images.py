"""Images: who may see, change and delete them, and what goes with the last one that needs a blob."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from broker import errors
from broker.catalog import blobs
from broker.model import BlobState, Exposure, new_id
from broker.service import blobs as blob_service
from broker.service import copies, locations
from broker.service import images as service
from broker.service.idempotency import Claim
from tests.catalog.registry import ADMIN, ALICE, BOB, MD5, READER, SERVICE, Registry
from tests.parts.condition import until


def fresh() -> Claim:
    return Claim(new_id())


async def _state(registry: Registry, blob: UUID) -> BlobState:
    found = await blobs.get(registry.db, blob)
    assert found is not None
    return found.state


async def _taken(registry: Registry, store: str) -> int:
    return int(await registry.db.fetchval("SELECT taken FROM spaces JOIN stores ON id = store_id WHERE name = $1", store))


async def test_an_image_is_active_as_soon_as_one_of_its_blobs_is(registry: Registry) -> None:
    queued, active = await registry.add_blob(), await registry.add_blob(BlobState.ACTIVE)
    made = await service.create_image(registry.context, ADMIN, {"name": "n", "blobs": {"raw": str(queued)}}, fresh())
    assert made.body["status"] == "queued"
    made = await service.create_image(registry.context, ADMIN, {"name": "n", "blobs": {"raw": str(queued), "qcow2": str(active)}}, fresh())
    assert made.body["status"] == "active"
    assert made.body["blobs"]["qcow2"] == {"id": str(active), "size": 3, "digests": {"md5": MD5}, "state": "active"}
    empty = await service.create_image(registry.context, ALICE, {"name": "n", "properties": {"os": "linux"}}, fresh())
    assert (empty.body["status"], empty.body["visibility"], empty.body["project"]) == ("queued", "private", "p")


async def test_a_taken_id_is_a_conflict_whoever_has_it(registry: Registry) -> None:
    id = await registry.add_image(ALICE, {})
    details = []
    for client in (ALICE, BOB):
        with pytest.raises(errors.Conflict) as caught:
            await service.create_image(registry.context, client, {"name": "debian", "id": str(id)}, fresh())
        details.append(caught.value.problem())
    assert details[0] == details[1]


async def test_what_an_image_will_hold_is_for_its_own_project_to_say(registry: Registry) -> None:
    """Whoever shares a queued blob could bring its bytes, into the public image too."""
    queued, active = await registry.add_blob(), await registry.add_blob(BlobState.ACTIVE)
    await registry.add_image(ALICE, {"raw": queued, "qcow2": active}, visibility="public")
    for client in (BOB, SERVICE):
        with pytest.raises(errors.NotFound):
            await service.create_image(registry.context, client, {"name": "n", "blobs": {"raw": str(queued)}}, fresh())
        made = await service.create_image(registry.context, client, {"name": "n", "blobs": {"raw": str(active)}}, fresh())
        assert made.body["status"] == "active"
    for client in (ALICE, ADMIN):
        made = await service.create_image(registry.context, client, {"name": "n", "blobs": {"raw": str(queued)}}, fresh())
        assert made.body["status"] == "queued"


async def test_the_id_of_an_image_that_had_bytes_is_never_given_again(registry: Registry) -> None:
    """Else whoever is told to boot it would boot another one. Who had it, and what is left unfinished, makes no difference to others."""
    booted = await registry.add_image(ALICE, {"raw": await registry.add_blob(BlobState.ACTIVE)})
    empty = await registry.add_image(ALICE, {})
    for id in (booted, empty):
        await service.delete_image(registry.context, ALICE, id, None)
    for client, claim in ((ALICE, fresh()), (BOB, fresh()), (BOB, Claim(booted, repeated=True))):
        request = {"name": "debian"} if claim.repeated else {"name": "debian", "id": str(booted)}
        with pytest.raises(errors.Conflict, match="taken"):
            await service.create_image(registry.context, client, request, claim)
        with pytest.raises(errors.NotFound):
            await service.get_image(registry.context, ADMIN, booted)
    assert (await service.create_image(registry.context, BOB, {"name": "n", "id": str(empty)}, fresh())).body["project"] == "q"
    assert (await service.create_image(registry.context, ADMIN, {"name": "n", "id": str(booted)}, fresh())).body["id"] == str(booted)


async def test_an_id_is_not_given_again_while_its_image_is_being_deleted(registry: Registry) -> None:
    id = await registry.add_image(ALICE, {"raw": await registry.add_blob(BlobState.ACTIVE)})
    async with registry.db.acquire() as connection, connection.transaction():
        await connection.execute("DELETE FROM images WHERE id = $1", id)
        again = asyncio.create_task(service.create_image(registry.context, BOB, {"name": "n", "id": str(id)}, fresh()))
        await until(lambda: registry.db.fetchval(_WAITS), "nobody waits for the deletion")
    with pytest.raises(errors.Conflict, match="taken"):
        await again


_WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"


async def test_a_repeated_request_shows_its_own_image_and_no_other(registry: Registry) -> None:
    claim = fresh()
    made = await service.create_image(registry.context, ALICE, {"name": "n"}, claim)
    assert await service.create_image(registry.context, ALICE, {"name": "n"}, claim._replace(repeated=True)) == made
    with pytest.raises(errors.Conflict):
        await service.create_image(registry.context, BOB, {"name": "n", "id": made.body["id"]}, fresh()._replace(repeated=True))


async def test_a_blob_can_be_named_only_by_who_may_read_it(registry: Registry) -> None:
    blob, going = await registry.add_blob(BlobState.ACTIVE), await registry.add_blob(BlobState.ACTIVE)
    await registry.add_image(ALICE, {"raw": blob})
    await registry.add_image(BOB, {"raw": going})
    await registry.db.execute("UPDATE blobs SET state = 'deleting' WHERE id = $1", going)
    problems = []
    for hidden in (blob, new_id(), going):
        with pytest.raises(errors.NotFound) as caught:
            await service.create_image(registry.context, BOB, {"name": "theft", "blobs": {"raw": str(hidden)}}, fresh())
        problems.append(caught.value.problem())
    assert problems[0] == problems[1] == problems[2]
    assert problems[0]["field"] == "blobs.raw"
    with pytest.raises(errors.NotFound):
        await blob_service.get_blob(registry.context, BOB, blob)
    shown = await blob_service.get_blob(registry.context, ALICE, blob)
    assert (shown["size"], [entry["format"] for entry in shown["images"]]) == (3, ["raw"])


async def test_publishing_and_deactivating_is_for_administrators(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    id = await registry.add_image(ALICE, {"raw": blob})
    with pytest.raises(errors.Forbidden):
        await service.create_image(registry.context, ALICE, {"name": "n", "visibility": "public"}, fresh())
    for change in ({"visibility": "public"}, {"status": "deactivated"}):
        with pytest.raises(errors.Forbidden):
            await service.change_image(registry.context, ALICE, id, 1, change)
    off = await service.change_image(registry.context, ADMIN, id, 1, {"status": "deactivated", "visibility": "public"})
    assert (off.body["status"], off.body["visibility"]) == ("deactivated", "public")
    with pytest.raises(errors.Forbidden):
        await service.change_image(registry.context, ALICE, id, off.version, {"status": "active"})
    renamed = await service.change_image(registry.context, ALICE, id, off.version, {"name": "mine still"})
    assert (renamed.body["status"], renamed.body["visibility"]) == ("deactivated", "public")
    on = await service.change_image(registry.context, ADMIN, id, renamed.version, {"status": "active"})
    assert on.body["status"] == "active"


async def test_deactivating_reaches_the_memory_of_other_brokers_by_blob(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    id = await registry.add_image(ALICE, {"raw": blob})
    await registry.db.execute("DELETE FROM changes")
    await service.change_image(registry.context, ADMIN, id, 1, {"status": "deactivated"})
    told = {(row["kind"], row["subject"]) for row in await registry.db.fetch("SELECT kind, subject FROM changes")}
    assert {("image", str(id)), ("blob", str(blob))} <= told


async def test_a_merge_patch_sets_and_removes_properties(registry: Registry) -> None:
    made = await service.create_image(registry.context, ALICE, {"name": "n", "properties": {"a": "1", "b": "2"}}, fresh())
    id = UUID(made.body["id"])
    changed = await service.change_image(registry.context, ALICE, id, made.version, {"properties": {"a": None, "c": "3"}})
    assert changed.body["properties"] == {"b": "2", "c": "3"}
    assert changed.body["name"] == "n"
    with pytest.raises(errors.Invalid) as caught:
        await service.change_image(registry.context, ALICE, id, changed.version, {"properties": {f"p{i}": "" for i in range(127)}})
    assert caught.value.field == "properties"
    with pytest.raises(errors.Conflict):
        await service.change_image(registry.context, ALICE, id, changed.version, {"status": "active"})


async def test_of_two_changes_on_one_version_one_is_refused(registry: Registry) -> None:
    id = await registry.add_image(ALICE, {})
    changes = [service.change_image(registry.context, ALICE, id, 1, {"name": name}) for name in "abc"]
    outcomes = await asyncio.gather(*changes, return_exceptions=True)
    assert sum(isinstance(outcome, errors.PreconditionFailed) for outcome in outcomes) == 2


async def test_what_is_not_visible_does_not_exist_and_what_is_not_owned_stays(registry: Registry) -> None:
    private = await registry.add_image(ALICE, {})
    community = await registry.add_image(ALICE, {}, visibility="community")
    for attempt in (
        service.get_image(registry.context, BOB, private),
        service.change_image(registry.context, BOB, private, 1, {"name": "x"}),
        service.delete_image(registry.context, BOB, private, 1),
    ):
        with pytest.raises(errors.NotFound):
            await attempt
    assert (await service.get_image(registry.context, BOB, community)).version == 1
    for client in (BOB, READER, SERVICE):
        with pytest.raises(errors.Forbidden):
            await service.delete_image(registry.context, client, community, 1)
    with pytest.raises(errors.Forbidden):
        await service.create_image(registry.context, READER, {"name": "n"}, fresh())


async def test_lists_hold_the_own_and_the_public_images_page_by_page(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    mine = await registry.add_image(ALICE, {"raw": blob}, name="mine")
    public = await registry.add_image(BOB, {"qcow2": blob}, name="public", visibility="public")
    await registry.add_image(BOB, {}, name="community", visibility="community")
    await registry.add_image(BOB, {}, name="private")

    async def names(query: dict[str, object], client: object = ALICE) -> list[str]:
        return [image["name"] for image in (await service.list_images(registry.context, client, query))["images"]]  # type: ignore[arg-type]

    assert await names({}) == ["mine", "public"]
    assert len(await names({}, ADMIN)) == 4
    assert await names({}, SERVICE) == ["public"]
    assert await names({"format": "qcow2"}) == ["public"]
    assert await names({"project": "q"}) == ["public"]
    assert await names({"visibility": "private"}) == ["mine"]
    assert await names({"name": "private"}) == []
    assert await names({"status": "queued"}) == []
    first = await service.list_images(registry.context, ALICE, {"limit": 1})
    assert ([image["id"] for image in first["images"]], first["next"]) == ([str(mine)], str(mine))
    second = await service.list_images(registry.context, ALICE, {"limit": 1, "marker": first["next"]})
    assert [image["id"] for image in second["images"]] == [str(public)]
    assert "next" not in second
    with pytest.raises(errors.Invalid):
        await service.list_images(registry.context, ALICE, {"marker": "' OR true --"})


async def test_deleting_removes_what_was_delegated_keeps_the_rest_and_names_no_private_store(registry: Registry) -> None:
    """Invariant 7 and M13."""
    for name in ("a", "b"):
        await registry.add_store(name)
    await registry.add_store("local", Exposure.SERVICE)
    blob, shared = await registry.add_blob(), await registry.add_blob()
    id = await registry.add_image(ALICE, {"raw": blob, "qcow2": shared})
    other = await registry.add_image(BOB, {"qcow2": shared})
    await registry.add_replica(ALICE, blob, "a", "p/raw", deletable=True)
    await registry.add_replica(ALICE, blob, "b", "p/raw")
    await registry.add_replica(SERVICE, blob, "local", "cache/1", deletable=True)
    await registry.add_replica(SERVICE, blob, "local", "cache/2")
    await registry.add_replica(ALICE, shared, "a", "p/qcow2", deletable=True)
    assert await _taken(registry, "local") == 6
    version = (await service.get_image(registry.context, ALICE, id)).version
    with pytest.raises(errors.PreconditionFailed):
        await service.delete_image(registry.context, ALICE, id, version + 1)
    told = await service.delete_image(registry.context, ALICE, id, version)
    assert told["deleting"] == [{"store": "a", "key": "p/raw"}]
    assert [(entry["store"], entry["key"]) for entry in told["kept"]] == [("b", "p/raw")]
    scheduled = await registry.db.fetch("SELECT key, frees FROM deletions ORDER BY key")
    assert [tuple(row) for row in scheduled] == [("cache/1", 3), ("p/raw", 3)]
    assert await _state(registry, blob) is BlobState.DELETING
    assert await _state(registry, shared) is BlobState.ACTIVE
    assert (await _taken(registry, "a"), await _taken(registry, "b"), await _taken(registry, "local")) == (6, 0, 3)
    view = await registry.context.memory.blob(blob)
    assert view is not None
    assert {replica.state for replica in view.replicas} == {"deleting"}
    assert (await service.get_image(registry.context, BOB, other)).body["status"] == "active"
    with pytest.raises(errors.NotFound):
        await service.delete_image(registry.context, ALICE, id, None)


async def test_of_images_that_share_a_blob_the_last_to_go_takes_it_along(registry: Registry) -> None:
    """Invariant 7, with deleters at once: the bytes are scheduled exactly once, and only when no image is left."""
    await registry.add_store("a")
    for _ in range(5):
        blob = await registry.add_blob()
        ids = [await registry.add_image(ALICE, {"raw": blob}) for _ in range(4)]
        await registry.add_replica(ALICE, blob, "a", f"p/{blob}", deletable=True)
        kept = ids.pop()
        await asyncio.gather(*(service.delete_image(registry.context, ALICE, id, None) for id in ids))
        assert await _state(registry, blob) is BlobState.ACTIVE
        assert await registry.db.fetchval("SELECT count(*) FROM deletions WHERE key = $1", f"p/{blob}") == 0
        one_more = service.create_image(registry.context, ALICE, {"name": "n", "blobs": {"raw": str(blob)}}, fresh())
        _, made = await asyncio.gather(service.delete_image(registry.context, ALICE, kept, None), one_more, return_exceptions=True)
        if isinstance(made, BaseException):
            assert isinstance(made, errors.NotFound)
            assert await _state(registry, blob) is BlobState.DELETING
            assert await registry.db.fetchval("SELECT count(*) FROM deletions WHERE key = $1", f"p/{blob}") == 1
        else:
            assert await _state(registry, blob) is BlobState.ACTIVE
            assert await registry.db.fetchval("SELECT count(*) FROM deletions WHERE key = $1", f"p/{blob}") == 0


async def test_two_images_of_two_shared_blobs_are_deleted_at_once_without_a_deadlock(registry: Registry) -> None:
    await registry.add_store("a")
    await registry.add_store("b")
    for _ in range(5):
        one, two = await registry.add_blob(), await registry.add_blob()
        ids = [await registry.add_image(ALICE, formats) for formats in ({"raw": one, "iso": two}, {"raw": two, "iso": one})]
        await registry.add_replica(ALICE, one, "a", f"p/{one}")
        await registry.add_replica(ALICE, two, "b", f"p/{two}")
        await asyncio.gather(*(service.delete_image(registry.context, ALICE, id, None) for id in ids))
        assert await _state(registry, one) is await _state(registry, two) is BlobState.DELETING
    assert await blobs.forget_deleted(registry.db, 4) == 4
    assert await blobs.forget_deleted(registry.db) == 6
    assert await registry.db.fetchval("SELECT count(*) FROM blobs") == 0
    assert (await _taken(registry, "a"), await _taken(registry, "b")) == (0, 0)


async def test_what_stands_for_an_image_has_bytes(registry: Registry) -> None:
    """Where the format that was declared is awaited still, lists of locations and copies are about the one that is there."""
    await registry.add_store("s1")
    await registry.add_store("s2")
    here, awaited = await registry.add_blob(BlobState.ACTIVE), await registry.add_blob()
    id = await registry.add_image(ALICE, {"raw": here, "qcow2": awaited}, disk_format="qcow2")
    await registry.add_replica(ADMIN, here, "s1", "p/raw")
    assert service.main_format((await service.get_image(registry.context, ALICE, id)).body) == "raw"
    shown = await locations.list_locations(registry.context, ADMIN, id)
    assert [location.store for location in shown] == ["s1"]
    copy = await copies.create_copy(registry.context, ALICE, {"image": str(id), "store": "s2"}, fresh())
    assert copy["blob"] == str(here)
