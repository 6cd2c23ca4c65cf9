"""Approval on a real catalogue: what waits, who decides, on what, and what an approved image may become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from broker import errors
from broker.catalog import blobs, counts, verdicts
from broker.catalog import images as catalogue
from broker.model import BlobState, Client, Visibility, new_id
from broker.service import blobs as service_blobs
from broker.service import images, locate, objects, targets, vetting
from broker.service.idempotency import Claim
from broker.vet import SIGNATURE_PROPERTIES, Policy
from tests.catalog.registry import ADMIN, ALICE, BOB, MD5, SERVICE, SIZE, Registry, running

SIGNATURE = {name: name.upper() for name in SIGNATURE_PROPERTIES}


@pytest.fixture
async def registry(pool: asyncpg.Pool[asyncpg.Record]) -> AsyncIterator[Registry]:
    """A broker where public images need approval."""
    async with running(pool) as registry:
        policy = replace(registry.context.policy, vetting=Policy(frozenset({Visibility.PUBLIC})))
        yield Registry(replace(registry.context, policy=policy), registry.told, registry.db)


async def proposed(registry: Registry, blob: UUID | None = None, **fields: Any) -> UUID:
    """An image that Alice proposes, whose bytes are there."""
    id = new_id()
    blob = blob or await registry.add_blob(BlobState.ACTIVE)
    await registry.add_image(ALICE, {"raw": blob})
    request = {"id": str(id), "name": "n", "visibility": "public", "blobs": {"raw": str(blob)}, **fields}
    await images.create_image(registry.context, ALICE, request, Claim(new_id()))
    return id


async def shown(registry: Registry, id: UUID) -> tuple[str, str | None]:
    body = (await images.get_image(registry.context, ADMIN, id)).body
    return body["status"], body.get("vetting")


async def version_of(registry: Registry, id: UUID) -> int:
    return (await images.get_image(registry.context, ADMIN, id)).version


async def decide(registry: Registry, asker: Client, id: UUID, decision: str, reason: str = "") -> dict[str, Any]:
    version = await version_of(registry, id)
    return (await vetting.decide_vetting(registry.context, asker, id, version, {"decision": decision, "reason": reason})).body


async def gives_bytes_to(registry: Registry, asker: Client, id: UUID) -> bool:
    try:
        locate.readable_image(asker, await registry.context.memory.image(id))
    except (errors.Forbidden, errors.NotFound):
        return False
    return True


async def test_what_is_proposed_waits_for_an_administrator(registry: Registry) -> None:
    id = await proposed(registry)
    assert await shown(registry, id) == ("pending", "pending")
    assert [await gives_bytes_to(registry, asker, id) for asker in (ALICE, BOB, SERVICE, ADMIN)] == [False, False, False, True]
    with pytest.raises(errors.NotFound):  # what nobody vetted is shown to nobody
        await images.get_image(registry.context, BOB, id)
    assert [i["id"] for i in (await images.list_images(registry.context, ADMIN, {"status": "pending"}))["images"]] == [str(id)]
    assert str(id) not in {i["id"] for i in (await images.list_images(registry.context, BOB, {}))["images"]}
    for asker in (ALICE, SERVICE):
        with pytest.raises(errors.Forbidden):
            await decide(registry, asker, id, "approved")
    with pytest.raises(errors.Forbidden):
        await images.change_image(registry.context, ALICE, id, await version_of(registry, id), {"status": "active"})
    with pytest.raises(errors.PreconditionFailed):
        await vetting.decide_vetting(registry.context, ADMIN, id, await version_of(registry, id) - 1, {"decision": "approved"})
    states = {entry.state: entry.number for entry in await counts.states(registry.db) if entry.subject == "images"}
    assert states["pending"] == 1
    assert await verdicts.waiting_seconds(registry.db) > 0
    told = await decide(registry, ADMIN, id, "approved", "looked at it")
    assert told["vetting"] == "approved"
    assert [(entry["outcome"], entry["subject"], entry["detail"]) for entry in told["history"]] == [("approved", "root", "looked at it")]
    assert await shown(registry, id) == ("active", "approved")
    assert [await gives_bytes_to(registry, asker, id) for asker in (ALICE, BOB, SERVICE, ADMIN)] == [True] * 4
    assert await verdicts.waiting_seconds(registry.db) == 0
    mine = (await vetting.get_vetting(registry.context, ALICE, id)).body
    assert [set(entry) for entry in mine["history"]] == [{"outcome", "blobs", "detail", "at"}]
    with pytest.raises(errors.Forbidden):
        await vetting.get_vetting(registry.context, BOB, id)


async def test_bytes_that_come_later_do_not_make_it_active(registry: Registry) -> None:
    blob = await registry.add_blob()
    id = await proposed(registry, blob)
    assert await shown(registry, id) == ("queued", "pending")
    with pytest.raises(errors.Conflict, match="not there yet"):
        await decide(registry, ADMIN, id, "approved")
    await blobs.activate(registry.db, blob, SIZE, {"md5": MD5})
    assert await shown(registry, id) == ("pending", "pending")


async def test_a_decision_is_not_on_bytes_that_came_after_the_look(registry: Registry) -> None:
    id, late = await proposed(registry), await registry.add_blob()
    async with registry.db.acquire() as connection, connection.transaction():
        await catalogue.attach(connection, id, "qcow2", late)
    seen = await version_of(registry, id)
    async with registry.db.acquire() as connection, connection.transaction():
        await blobs.activate(connection, late, SIZE, {"md5": MD5}, None)
    with pytest.raises(errors.PreconditionFailed):
        await vetting.decide_vetting(registry.context, ADMIN, id, seen, {"decision": "approved"})
    await decide(registry, ADMIN, id, "approved")


@pytest.mark.parametrize("way", ["other properties", "more bytes", "visibility"])
async def test_what_an_administrator_deactivated_stays_so_whatever_its_owner_does(registry: Registry, way: str) -> None:
    """None of the ways to have it wait for approval, and then to want none, makes it active."""
    id = await proposed(registry)
    await decide(registry, ADMIN, id, "approved")
    if way == "visibility":
        await images.change_image(registry.context, ALICE, id, None, {"visibility": "private"})
    await images.change_image(registry.context, ADMIN, id, None, {"status": "deactivated"})
    if way == "more bytes":
        async with registry.db.acquire() as connection:
            await vetting.expect_bytes(connection, ALICE.principal, id, registry.context.policy.vetting)
    else:
        change = {"visibility": "public"} if way == "visibility" else {"properties": {"kernel_id": "k"}}
        await images.change_image(registry.context, ALICE, id, None, change)
    await images.change_image(registry.context, ALICE, id, None, {"visibility": "private"})
    assert (await shown(registry, id))[0] == "deactivated"
    assert not await gives_bytes_to(registry, ALICE, id)
    await images.change_image(registry.context, ADMIN, id, None, {"status": "active"})
    assert await gives_bytes_to(registry, ALICE, id)


async def test_rejected_stays_rejected(registry: Registry) -> None:
    id = await proposed(registry)
    await decide(registry, ADMIN, id, "rejected", "unknown origin")
    assert await shown(registry, id) == ("deactivated", "rejected")
    changed = await images.change_image(registry.context, ALICE, id, await version_of(registry, id), {"visibility": "private"})
    assert (changed.body["status"], changed.body["vetting"]) == ("deactivated", "rejected")
    assert [await gives_bytes_to(registry, asker, id) for asker in (ALICE, BOB, SERVICE, ADMIN)] == [False, False, False, True]
    with pytest.raises(errors.Forbidden):
        await images.change_image(registry.context, ALICE, id, changed.version, {"status": "active"})
    on = await images.change_image(registry.context, ADMIN, id, changed.version, {"status": "active"})  # as Glance's reactivate does
    assert on.body["status"] == "active"
    history = (await vetting.get_vetting(registry.context, ADMIN, id)).body["history"]
    assert [entry["outcome"] for entry in history] == ["rejected", "approved"]


@pytest.mark.parametrize("decision", [None, "rejected"])
async def test_what_is_not_approved_is_not_named_where_its_blob_is(registry: Registry, decision: str | None) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    withheld = await proposed(registry, blob)
    if decision is not None:
        await decide(registry, ADMIN, withheld, decision)
    request = {"id": str(new_id()), "name": "n", "visibility": "public", "blobs": {"raw": str(blob)}}
    approved = (await images.create_image(registry.context, ADMIN, request, Claim(new_id()))).body["id"]
    for asker, expected in ((BOB, {approved}), (ADMIN, {approved, str(withheld)})):
        told = (await service_blobs.get_blob(registry.context, asker, blob))["images"]
        (found,) = await objects.find(registry.context, asker, [str(blob)])
        assert isinstance(found, objects.Found)
        assert expected == {entry["image"] for entry in told} & {approved, str(withheld)}
        assert expected == set(found.parts[0].images) & {approved, str(withheld)}


async def test_what_could_boot_something_else_waits_again(registry: Registry) -> None:
    id = await proposed(registry)
    await decide(registry, ADMIN, id, "approved")
    version = await version_of(registry, id)
    plain = await images.change_image(registry.context, ALICE, id, version, {"name": "m", "properties": {"os_distro": "x"}, "tags": ["t"]})
    assert (plain.body["status"], plain.body["vetting"]) == ("active", "approved")
    bad = await images.change_image(registry.context, ALICE, id, plain.version, {"properties": {"kernel_id": str(new_id())}})
    assert (bad.body["status"], bad.body["vetting"]) == ("pending", "pending")
    await decide(registry, ADMIN, id, "approved")
    # one more format, by an upload
    request = {"operation": "upload", "image": str(id), "format": "qcow2"}
    target = await targets.resolve(registry.context, ALICE, request)
    async with registry.db.acquire() as connection, connection.transaction():
        await targets.write(connection, ALICE, target, registry.context.policy.vetting)
    assert await shown(registry, id) == ("pending", "pending")
    with pytest.raises(errors.Conflict, match="format qcow2 are not there"):
        await decide(registry, ADMIN, id, "approved")
    await blobs.activate(registry.db, target.blob_id, SIZE, {"md5": MD5})
    await decide(registry, ADMIN, id, "approved")
    assert await shown(registry, id) == ("active", "approved")


async def test_what_others_put_into_an_administrators_image_waits(registry: Registry) -> None:
    """Also where the format was there already, without bytes."""
    blob = await registry.add_blob()
    wanted = {"name": "n", "visibility": "public", "blobs": {"raw": str(blob)}}
    made = await images.create_image(registry.context, ADMIN, wanted, Claim(new_id()))
    id = UUID(made.body["id"])
    await registry.db.execute("UPDATE images SET project = 'p' WHERE id = $1", id)
    for asker, expected in ((ADMIN, ("queued", None)), (ALICE, ("queued", "pending"))):
        target = await targets.resolve(registry.context, asker, {"operation": "upload", "image": str(id), "format": "raw"})
        assert (target.blob_id, target.links) == (blob, False)
        async with registry.db.acquire() as connection, connection.transaction():
            await targets.write(connection, asker, target, registry.context.policy.vetting)
        assert await shown(registry, id) == expected


async def test_administrators_and_private_images_need_nobody(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    made = await images.create_image(
        registry.context, ADMIN, {"name": "n", "visibility": "public", "blobs": {"raw": str(blob)}}, Claim(new_id())
    )
    assert (made.body["status"], "vetting" in made.body) == ("active", False)
    id = await proposed(registry)
    back = await images.change_image(registry.context, ALICE, id, await version_of(registry, id), {"visibility": "private"})
    assert (back.body["status"], "vetting" in back.body) == ("active", False)


async def test_a_signature_counts_for_the_properties_and_the_bytes_that_were_looked_at(registry: Registry) -> None:
    context = replace(registry.context, policy=replace(registry.context.policy, vetting=Policy(frozenset({Visibility.PUBLIC}), True)))
    registry = Registry(context, registry.told, registry.db)
    id = await proposed(registry, properties=SIGNATURE)
    image = (await images.get_image(context, ADMIN, id)).body
    blob = image["blobs"]["raw"]["id"]

    async def tell(asker: Client, valid: bool, **other: Any) -> None:
        request = {"blob": blob, "valid": valid, "signature": SIGNATURE, "detail": "by a test", **other}
        await vetting.tell_verdict(context, asker, id, request)

    with pytest.raises(errors.Conflict, match="no agent has checked"):
        await decide(registry, ADMIN, id, "approved")
    assert "no agent" in (await vetting.get_vetting(context, ALICE, id)).body["obstacle"]
    with pytest.raises(errors.Forbidden):
        await tell(ALICE, True)
    with pytest.raises(errors.Conflict):
        await tell(SERVICE, True, signature={**SIGNATURE, "img_signature": "other"})
    with pytest.raises(errors.Conflict):
        await tell(SERVICE, True, blob=str(new_id()))
    await tell(SERVICE, True)
    await tell(SERVICE, False)
    with pytest.raises(errors.Conflict, match="does not hold"):
        await decide(registry, ADMIN, id, "approved")
    await tell(SERVICE, True)
    changed = await images.change_image(context, ALICE, id, await version_of(registry, id), {"properties": {"img_signature": "new"}})
    assert changed.body["vetting"] == "pending"
    with pytest.raises(errors.Conflict, match="no agent has checked"):
        await decide(registry, ADMIN, id, "approved")
    await tell(SERVICE, True, signature={**SIGNATURE, "img_signature": "new"})
    await decide(registry, ADMIN, id, "approved")
    assert await shown(registry, id) == ("active", "approved")


async def test_an_image_that_changes_while_it_is_approved_is_not_approved(registry: Registry) -> None:
    """Whichever comes first: the change makes it wait again, or the approval is refused."""
    for turn in range(5):
        id = await proposed(registry)
        version = await version_of(registry, id)
        change = {"properties": {"os_command_line": f"init=/bin/sh {turn}"}}
        outcomes = await asyncio.gather(
            images.change_image(registry.context, ALICE, id, None, change),
            vetting.decide_vetting(registry.context, ADMIN, id, version, {"decision": "approved"}),
            return_exceptions=True,
        )
        changed = (await images.get_image(registry.context, ADMIN, id)).body
        assert ("os_command_line" in changed["properties"], changed["status"]) in ((True, "pending"), (False, "active")), outcomes


async def test_only_the_last_verdicts_are_kept(registry: Registry) -> None:
    id = await proposed(registry)
    for number in range(verdicts.KEPT + 3):
        await verdicts.record(registry.db, id, verdicts.Recorded("valid", {}, {}, "s", "p", str(number)))
    kept = await verdicts.of_image(registry.db, id)
    assert [entry.detail for entry in kept] == [str(number) for number in range(3, verdicts.KEPT + 3)]
