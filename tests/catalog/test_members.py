"""Members of shared images: who adds them, who answers, who sees whom, and what that opens."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from broker import errors, permit
from broker.model import BlobState, Client, MemberStatus, Role, new_id
from broker.service import images, locate, members
from tests.catalog.registry import ADMIN, ALICE, BOB, READER, SERVICE, Registry, client

CAROL = client(Role.MEMBER, "r", "carol")
BOBS_READER = client(Role.READER, "q", "robot")


async def shared(registry: Registry, blob: UUID | None = None) -> UUID:
    return await registry.add_image(ALICE, {} if blob is None else {"raw": blob}, visibility="shared")


async def names(registry: Registry, asker: Client, id: UUID) -> list[tuple[str, str]]:
    found = await members.list_members(registry.context, asker, id)
    return [(member["member"], member["status"]) for member in found["members"]]


async def listed(registry: Registry, asker: Client, **query: Any) -> set[str]:
    return {image["id"] for image in (await images.list_images(registry.context, asker, query))["images"]}


async def test_the_owner_shares_and_the_member_answers(registry: Registry) -> None:
    context, id = registry.context, await shared(registry)
    made = await members.add_member(context, ALICE, id, "q")
    assert (made["member"], made["status"]) == ("q", "pending")
    with pytest.raises(errors.Conflict):
        await members.add_member(context, ALICE, id, "q")
    with pytest.raises(errors.Conflict):
        await members.add_member(context, ALICE, id, "p")
    await members.add_member(context, ADMIN, id, "r")
    assert await names(registry, ALICE, id) == await names(registry, SERVICE, id) == [("q", "pending"), ("r", "pending")]
    assert await names(registry, BOB, id) == [("q", "pending")]
    # who answers for whom
    for asker in (ALICE, READER):
        with pytest.raises(errors.Forbidden):
            await members.answer_member(context, asker, id, "q", MemberStatus.ACCEPTED)
    with pytest.raises(errors.Forbidden):
        await members.answer_member(context, BOBS_READER, id, "q", MemberStatus.ACCEPTED)
    with pytest.raises(errors.NotFound):
        await members.answer_member(context, CAROL, id, "q", MemberStatus.ACCEPTED)
    assert (await members.answer_member(context, BOB, id, "q", MemberStatus.ACCEPTED))["status"] == "accepted"
    assert (await members.answer_member(context, ADMIN, id, "r", MemberStatus.REJECTED))["status"] == "rejected"
    # who ends it
    with pytest.raises(errors.Forbidden):
        await members.remove_member(context, BOB, id, "q")
    await members.remove_member(context, ALICE, id, "q")
    for again in (members.remove_member(context, ALICE, id, "q"), members.get_member(context, ALICE, id, "q")):
        with pytest.raises(errors.NotFound):
            await again
    with pytest.raises(errors.NotFound):
        await members.list_members(context, BOB, id)
    assert (await members.get_member(context, CAROL, id, "r"))["status"] == "rejected"


async def test_who_is_no_member_cannot_tell_a_shared_image_from_none(registry: Registry) -> None:
    context, id = registry.context, await shared(registry)
    await members.add_member(context, ALICE, id, "r")
    told = []
    for image in (id, new_id()):
        for attempt in (
            members.list_members(context, BOB, image),
            members.get_member(context, BOB, image, "r"),
            members.add_member(context, BOB, image, "q"),
            members.answer_member(context, BOB, image, "q", MemberStatus.ACCEPTED),
            members.remove_member(context, BOB, image, "r"),
            images.get_image(context, BOB, image),
        ):
            with pytest.raises(errors.NotFound) as caught:
                await attempt
            told.append(caught.value.problem())
    assert told[:6] == told[6:]


async def test_a_member_reads_whatever_it_answered_and_lists_what_it_accepted(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    context, id = registry.context, await shared(registry, blob)

    async def reads(asker: Client) -> bool:
        hot = await context.memory.blob(blob)
        image = await context.memory.image(id)
        assert hot is not None
        assert not hot.read_by_all
        by_blob = permit.may_read_blob(asker.principal, hot.images)
        try:
            locate.readable_image(asker, image)
        except errors.NotFound:
            assert not by_blob
            return False
        assert by_blob
        return True

    assert not await reads(BOB)
    await members.add_member(context, ALICE, id, "q")
    assert await reads(BOB)
    assert await listed(registry, BOB) == await listed(registry, BOB, member_status="rejected") == set()
    assert await listed(registry, BOB, member_status="pending") == await listed(registry, BOB, member_status="all") == {str(id)}
    assert await listed(registry, CAROL, member_status="all") == set()
    for status in (MemberStatus.REJECTED, MemberStatus.ACCEPTED):
        await members.answer_member(context, BOB, id, "q", status)
        assert await reads(BOB)
        assert await listed(registry, BOB) == ({str(id)} if status is MemberStatus.ACCEPTED else set())
    assert await listed(registry, BOB, visibility="shared") == {str(id)}
    assert await listed(registry, BOB, visibility="private") == set()
    assert not await reads(CAROL)
    # the sharing ends with the visibility, and begins with it anew
    version = (await images.get_image(context, ALICE, id)).version
    changed = await images.change_image(context, ALICE, id, version, {"visibility": "private"})
    assert not await reads(BOB)
    assert await listed(registry, BOB) == set()
    with pytest.raises(errors.Forbidden, match="Only shared images"):
        await members.list_members(context, ALICE, id)
    await images.change_image(context, ALICE, id, changed.version, {"visibility": "shared"})
    assert await reads(BOB)
    assert await listed(registry, BOB) == {str(id)}
    await members.remove_member(context, ALICE, id, "q")
    assert not await reads(BOB)


async def test_a_change_of_members_reaches_the_memory_of_other_brokers(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    id = await shared(registry, blob)
    for change in (
        members.add_member(registry.context, ALICE, id, "q"),
        members.answer_member(registry.context, BOB, id, "q", MemberStatus.ACCEPTED),
        members.remove_member(registry.context, ALICE, id, "q"),
    ):
        await registry.db.execute("DELETE FROM changes")
        await change
        told = {(row["kind"], row["subject"]) for row in await registry.db.fetch("SELECT kind, subject FROM changes")}
        assert told == {("image", str(id)), ("blob", str(blob))}


async def test_as_many_members_as_may_be_and_one_more(registry: Registry) -> None:
    id = await shared(registry)
    await registry.db.execute(
        "INSERT INTO image_members (image_id, project) SELECT $1, 'm' || n FROM generate_series(1, $2) n", id, members.MAX_MEMBERS - 2
    )
    adding = [members.add_member(registry.context, ALICE, id, f"new{number}") for number in range(4)]
    outcomes = await asyncio.gather(*adding, return_exceptions=True)
    assert sum(isinstance(outcome, errors.TooLarge) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, dict) for outcome in outcomes) == 2
    assert len(await names(registry, ALICE, id)) == members.MAX_MEMBERS


async def test_protected_images_stay(registry: Registry) -> None:
    id = await registry.add_image(ALICE, {}, protected=True)
    for asker in (ALICE, ADMIN):
        with pytest.raises(errors.Forbidden):
            await images.delete_image(registry.context, asker, id, None)
    version = (await images.get_image(registry.context, ALICE, id)).version
    changed = await images.change_image(registry.context, ALICE, id, version, {"protected": False})
    await images.delete_image(registry.context, ALICE, id, changed.version)
