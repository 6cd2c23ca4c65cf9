"""Replicas: the broker looks before one counts, nobody registers what is not his, and the last good one stays."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from broker import errors
from broker.catalog import blobs, deletions, images, replicas
from broker.model import BlobState, Client, Exposure, ImageStatus, Role, new_id
from broker.service import blobs as blob_service
from broker.service import replicas as service
from broker.service.idempotency import Claim
from broker.service.listing import Versioned
from tests.catalog.registry import ADMIN, ALICE, BOB, MD5, OTHER_MD5, READER, SERVICE, Registry, client


def fresh() -> Claim:
    return Claim(new_id())


@pytest.fixture
async def blob(registry: Registry) -> UUID:
    """A queued blob of an image of ALICE's, beside a public store ``a`` and a private one ``local``."""
    await registry.add_store("a")
    await registry.add_store("local", Exposure.SERVICE)
    id = await registry.add_blob()
    await registry.add_image(ALICE, {"raw": id})
    return id


async def _register(registry: Registry, who: Client, blob: UUID, store: str = "a", key: str = "p/k", **fields: object) -> Versioned:
    return await service.register_replica(registry.context, who, blob, {"store": store, "key": key, **fields}, fresh())


async def _none_registered(registry: Registry) -> bool:
    return not await registry.db.fetchval("SELECT count(*) FROM replicas")


async def test_the_first_verified_replica_makes_blob_and_image_active(registry: Registry, blob: UUID) -> None:
    """Invariant 4."""
    registry.put("a", "p/k")
    made = await _register(registry, ALICE, blob)
    assert (made.body["state"], made.body["key"], made.body["project"], made.body["deletable"]) == ("active", "p/k", "p", False)
    assert (made.body["observed"]["by"], made.body["observed"]["strength"]) == ("broker", "md5")
    found = await blobs.get(registry.db, blob)
    assert found is not None
    assert found.state is BlobState.ACTIVE
    view = await registry.context.memory.blob(blob)
    assert view is not None
    assert [image.status for image in view.images] == [ImageStatus.ACTIVE]
    assert [replica.state for replica in view.replicas] == ["active"]


async def test_what_differs_is_refused_with_both_sides_shown_and_nothing_registered(registry: Registry, blob: UUID) -> None:
    registry.put("a", "p/k", digests={"md5": OTHER_MD5})
    with pytest.raises(errors.Mismatch) as caught:
        await _register(registry, ALICE, blob)
    assert caught.value.extra == {"declared": {"digests.md5": MD5}, "observed": {"digests.md5": OTHER_MD5}}
    registry.put("a", "p/k", size=4)
    with pytest.raises(errors.Mismatch):
        await _register(registry, ALICE, blob)
    registry.put("a", "p/k", digests={})
    with pytest.raises(errors.Unverifiable):
        await _register(registry, ALICE, blob)
    with pytest.raises(errors.NotUploaded):
        await _register(registry, ALICE, blob, key="p/absent")
    assert await _none_registered(registry)
    assert await registry.db.fetchval("SELECT count(*) FROM deletions") == 0
    assert await registry.db.fetchval("SELECT sum(taken) FROM spaces") == 0


async def test_nothing_declared_takes_no_replica(registry: Registry, blob: UUID) -> None:
    registry.put("a", "p/k")
    await registry.db.execute("UPDATE blobs SET size = NULL WHERE id = $1", blob)
    with pytest.raises(errors.Conflict):
        await _register(registry, ALICE, blob)


async def test_a_location_is_registered_once(registry: Registry, blob: UUID) -> None:
    other = await registry.add_blob()
    await registry.add_image(ALICE, {"raw": other})
    registry.put("a", "p/k")
    attempts = [_register(registry, ALICE, each) for each in (blob, other, blob, other)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(outcome, errors.Conflict) for outcome in outcomes) == 3
    assert await registry.db.fetchval("SELECT taken FROM spaces JOIN stores ON id = store_id WHERE name = 'a'") == 3


async def test_what_is_being_written_or_deleted_cannot_be_registered(registry: Registry, blob: UUID) -> None:
    store = registry.context.memory.store("a")
    assert store is not None
    await deletions.schedule(registry.db, store.id, "p/going", reason="test")
    upload, other = new_id(), await registry.add_blob()
    await registry.db.execute(
        "INSERT INTO uploads (id, blob_id, project, subject, expires_at) VALUES ($1, $2, 'p', 'u', now())", upload, other
    )
    await registry.db.execute(
        """INSERT INTO destinations (upload_id, store_id, rank, state, staging_key, final_key)
           VALUES ($1, $2, 1, 'active', 'p/stage', 'p/final')""",
        upload, store.id,
    )  # fmt: skip
    for key in ("p/going", "p/stage", "p/final"):
        registry.put("a", key)
        with pytest.raises(errors.Conflict):
            await _register(registry, ALICE, blob, key=key)
    assert await _none_registered(registry)


async def test_a_repeated_registration_shows_the_same_replica(registry: Registry, blob: UUID) -> None:
    registry.put("a", "p/k")
    claim = fresh()
    request = {"store": "a", "key": "p/k"}
    made = await service.register_replica(registry.context, ALICE, blob, request, claim)
    assert await service.register_replica(registry.context, ALICE, blob, request, claim._replace(repeated=True)) == made


async def test_nobody_registers_where_he_may_not_write(registry: Registry, blob: UUID) -> None:
    await registry.add_store("readonly", writable=False)
    await registry.add_store("off", enabled=False)
    for store in ("a", "local", "readonly", "off"):
        registry.put(store, "p/k")
    with pytest.raises(errors.NotFound) as hidden:
        await _register(registry, ALICE, blob, "local")
    with pytest.raises(errors.NotFound) as absent:
        await _register(registry, ALICE, blob, "absent")
    assert hidden.value.problem() == absent.value.problem()
    for store in ("readonly", "off"):
        with pytest.raises(errors.Forbidden):
            await _register(registry, ALICE, blob, store)
    with pytest.raises(errors.Forbidden):
        await _register(registry, ADMIN, blob, "readonly", deletable=True)
    with pytest.raises(errors.Forbidden):
        await _register(registry, READER, blob)
    with pytest.raises(errors.NotFound):
        await _register(registry, BOB, blob)
    assert await _none_registered(registry)
    await _register(registry, ADMIN, blob, "readonly")
    registry.put("local", "anything")
    await _register(registry, SERVICE, blob, "local", "anything", purpose="cache")


async def test_members_name_only_keys_of_their_project(registry: Registry, blob: UUID) -> None:
    """Whether the object exists makes no difference: it is not looked for."""
    registry.put("a", "q/secret")
    problems = []
    for key in ("q/secret", "q/absent", "pp/k", "p"):
        with pytest.raises(errors.Forbidden) as caught:
            await _register(registry, ALICE, blob, key=key)
        problems.append(caught.value.problem())
    assert all(problem == problems[0] for problem in problems)
    slashed = client(Role.MEMBER, "p/sub")
    await registry.db.execute("UPDATE images SET project = 'p/sub'")
    registry.put("a", "p/sub/k")
    with pytest.raises(errors.Forbidden):
        await _register(registry, slashed, blob, key="p/sub/k")


@pytest.mark.parametrize("key", ["", "/p/k", "p//k", "p/../q/k", "p/./k", "p/k/", "p/\u2028", "p/" + "ü" * 512])
async def test_a_key_that_can_be_none_is_refused(registry: Registry, blob: UUID, key: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        await _register(registry, ALICE, blob, key=key)
    assert caught.value.field == "key"


async def test_of_two_who_delete_the_last_two_replicas_one_is_refused(registry: Registry, blob: UUID) -> None:
    """Invariant 6, with deleters at once."""
    for n in range(10):
        await registry.add_replica(ALICE, blob, "a", f"p/{n}", deletable=bool(n % 2))
        if n == 0:
            continue
        left = [row["id"] for row in await registry.db.fetch("SELECT id FROM replicas WHERE state = 'active'")]
        assert len(left) == 2
        outcomes = await asyncio.gather(*(service.delete_replica(registry.context, ALICE, id, 1) for id in left), return_exceptions=True)
        assert sum(isinstance(outcome, errors.LastReplica) for outcome in outcomes) == 1
        assert await registry.db.fetchval("SELECT count(*) FROM replicas WHERE state = 'active'") == 1


async def test_the_last_one_that_a_member_may_know_of_stays_whatever_lies_on_private_stores(registry: Registry, blob: UUID) -> None:
    id = await registry.add_replica(ALICE, blob, "a", "p/k", deletable=True)
    await registry.add_replica(SERVICE, blob, "local", "cache/k")
    with pytest.raises(errors.LastReplica):
        await service.delete_replica(registry.context, ALICE, id, 1)
    await service.delete_replica(registry.context, ADMIN, id, 1)


async def test_the_last_replica_goes_once_its_blob_is_not_needed(registry: Registry, blob: UUID) -> None:
    id = await registry.add_replica(ALICE, blob, "a", "p/k", deletable=True)
    with pytest.raises(errors.LastReplica):
        await service.delete_replica(registry.context, ALICE, id, 1)
    await registry.db.execute("UPDATE blobs SET state = 'deleting' WHERE id = $1", blob)
    await service.delete_replica(registry.context, ALICE, id, 1)
    assert await registry.db.fetchval("SELECT replica_id FROM deletions") == id


async def test_only_delegated_bytes_are_deleted_and_space_is_given_back_with_them(registry: Registry, blob: UUID) -> None:
    kept = await registry.add_replica(ALICE, blob, "a", "p/kept")
    theirs = await registry.add_replica(ALICE, blob, "a", "p/theirs")
    ours = await registry.add_replica(ALICE, blob, "a", "p/ours", deletable=True)
    await service.delete_replica(registry.context, ALICE, theirs, 1)
    assert await registry.db.fetchval("SELECT count(*) FROM deletions") == 0
    assert await registry.db.fetchval("SELECT sum(taken) FROM spaces") == 6
    with pytest.raises(errors.NotFound):
        await service.get_replica(registry.context, ALICE, theirs)
    await service.delete_replica(registry.context, ALICE, ours, 1)
    assert (await service.get_replica(registry.context, ALICE, ours)).body["state"] == "deleting"
    assert await registry.db.fetchval("SELECT sum(taken) FROM spaces") == 6
    await service.delete_replica(registry.context, ALICE, ours, None)
    (due,) = await deletions.due(registry.db, 10)
    assert due.key == "p/ours"
    await deletions.done(registry.db, due)
    assert await registry.db.fetchval("SELECT sum(taken) FROM spaces") == 3
    assert [record.replica.id for record in await replicas.of_blobs(registry.db, [blob])] == [kept]


async def test_another_look_finds_what_has_become_of_a_replica(registry: Registry, blob: UUID) -> None:
    """Invariant 5."""
    id = await registry.add_replica(ALICE, blob, "a", "p/k")

    async def look(version: int) -> str:
        return str((await service.change_replica(registry.context, ALICE, id, version, {"state": "active"})).body["state"])

    registry.put("a", "p/k", digests={"md5": OTHER_MD5})
    assert await look(1) == "corrupt"
    view = await registry.context.memory.blob(blob)
    assert view is not None
    assert [replica.state for replica in view.replicas] == ["corrupt"]
    registry.put("a", "p/k", digests={})
    with pytest.raises(errors.Unverifiable):
        await look(2)
    registry.put("a", "p/k")
    assert await look(2) == "active"
    del registry.told.objects["a", "p/k"]
    assert await look(3) == "missing"
    with pytest.raises(errors.PreconditionFailed):
        await look(3)


async def test_a_change_by_hand(registry: Registry, blob: UUID) -> None:
    id = await registry.add_replica(ALICE, blob, "a", "p/k")
    changed = await service.change_replica(registry.context, ALICE, id, 1, {"state": "corrupt", "purpose": "cache", "deletable": True})
    assert (changed.body["state"], changed.body["purpose"], changed.body["deletable"], changed.version) == ("corrupt", "cache", True, 2)
    with pytest.raises(errors.PreconditionFailed):
        await service.change_replica(registry.context, ALICE, id, 1, {"purpose": "origin"})
    await registry.db.execute("UPDATE replicas SET state = 'unsealed'")
    with pytest.raises(errors.Conflict):
        await service.change_replica(registry.context, ALICE, id, 2, {"state": "active"})
    await registry.db.execute("UPDATE replicas SET state = 'deleting'")
    with pytest.raises(errors.Conflict):
        await service.change_replica(registry.context, ALICE, id, 2, {"state": "corrupt"})


async def test_the_right_to_delete_is_delegated_only_for_own_keys_on_writable_stores(registry: Registry, blob: UUID) -> None:
    """An administrator hands a replica over to a project whose keys it does not have."""
    id = await registry.add_replica(ADMIN, blob, "a", "archive/k")
    await registry.db.execute("UPDATE replicas SET project = 'p'")
    with pytest.raises(errors.Forbidden):
        await service.change_replica(registry.context, ALICE, id, 1, {"deletable": True})
    own = await registry.add_replica(ALICE, blob, "a", "p/k")
    await registry.db.execute("UPDATE stores SET writable = false WHERE name = 'a'")
    await registry.context.memory.reload_stores()
    with pytest.raises(errors.Forbidden):
        await service.change_replica(registry.context, ALICE, own, 1, {"deletable": True})


async def test_others_see_no_private_store_no_key_and_only_active_replicas(registry: Registry, blob: UUID) -> None:
    await registry.db.execute("UPDATE images SET visibility = 'public'")
    open_id = await registry.add_replica(ALICE, blob, "a", "p/k")
    local = await registry.add_replica(SERVICE, blob, "local", "cache/k", purpose="cache")
    seen = (await service.list_blob_replicas(registry.context, BOB, blob))["replicas"]
    assert [replica["id"] for replica in seen] == [str(open_id)]
    assert set(seen[0]) == {"id", "blob", "store", "site", "purpose", "state", "deletable", "observed"}
    assert len((await service.list_blob_replicas(registry.context, SERVICE, blob))["replicas"]) == 2
    with pytest.raises(errors.NotFound) as hidden:
        await service.get_replica(registry.context, ALICE, local)
    with pytest.raises(errors.NotFound) as absent:
        await service.get_replica(registry.context, ALICE, new_id())
    assert hidden.value.problem() == absent.value.problem()
    with pytest.raises(errors.Forbidden):
        await service.delete_replica(registry.context, BOB, open_id, 1)
    with pytest.raises(errors.Forbidden):
        await service.change_replica(registry.context, SERVICE, open_id, 1, {"state": "corrupt"})
    await service.change_replica(registry.context, ALICE, open_id, 1, {"state": "corrupt"})
    assert (await service.list_blob_replicas(registry.context, BOB, blob))["replicas"] == []
    with pytest.raises(errors.NotFound):
        await service.get_replica(registry.context, BOB, open_id)
    with pytest.raises(errors.NotFound):
        await blob_service.get_blob(registry.context, BOB, new_id())


async def test_a_cache_is_looked_after_by_store_purpose_and_state(registry: Registry, blob: UUID) -> None:
    origin = await registry.add_replica(ALICE, blob, "a", "p/k")
    caches = [await registry.add_replica(SERVICE, blob, "local", f"c/{n}", purpose="cache") for n in range(3)]

    async def ids(who: Client, **query: object) -> list[str]:
        return [replica["id"] for replica in (await service.list_replicas(registry.context, who, query))["replicas"]]

    assert await ids(SERVICE, store="local", purpose="cache") == [str(id) for id in caches]
    assert await ids(ADMIN, state="active", purpose="origin") == [str(origin)]
    assert await ids(ALICE) == [str(origin)]
    assert await ids(BOB) == []
    assert await ids(ALICE, store="local") == []
    first = await service.list_replicas(registry.context, SERVICE, {"store": "local", "limit": 2})
    assert first["next"] == str(caches[1])
    assert await ids(SERVICE, store="local", limit=2, marker=first["next"]) == [str(caches[2])]
    with pytest.raises(errors.Invalid):
        await ids(SERVICE, marker="x")


async def test_a_blob_that_is_retired_while_the_store_is_asked_takes_no_replica(registry: Registry, blob: UUID) -> None:
    declared = await blobs.get(registry.db, blob)
    assert declared is not None
    registry.put("a", "p/k")

    class Slow:
        async def stat(self, key: str) -> object:
            for image in await images.page(registry.db, project=None, limit=10):
                await registry.db.execute("DELETE FROM images WHERE id = $1", image.id)
            await registry.db.execute("UPDATE blobs SET state = 'deleting' WHERE id = $1", blob)
            return registry.told.objects["a", key]

    registry.context.memory._drivers["a"] = Slow()  # type: ignore[assignment]
    with pytest.raises(errors.Conflict):
        await _register(registry, ALICE, blob)
    assert await _none_registered(registry)
