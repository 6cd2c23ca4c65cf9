"""Copies that several projects want: one is made, and each sees it as that of its own image."""

from __future__ import annotations

from uuid import UUID

import pytest

from broker import errors
from broker.model import BlobState, Role, new_id
from broker.service import copies
from broker.service.idempotency import Claim
from tests.catalog.registry import ALICE, BOB, Registry, client

CAROL = client(Role.MEMBER, "r", "carol")


async def test_a_copy_that_others_asked_for_tells_nothing_of_their_image(registry: Registry) -> None:
    blob = await registry.add_blob(BlobState.ACTIVE)
    hers, his = [str(await registry.add_image(who, {"raw": blob}, visibility="private")) for who in (ALICE, BOB)]
    await registry.add_store("there")
    made = await copies.create_copy(registry.context, ALICE, {"image": hers, "store": "there"}, Claim(new_id()))
    same = await copies.create_copy(registry.context, BOB, {"image": his, "store": "there"}, Claim(new_id()))
    assert (made["image"], same["image"], same["id"]) == (hers, his, made["id"])
    for who, image in ((ALICE, hers), (BOB, his)):
        assert (await copies.get_copy(registry.context, who, UUID(made["id"])))["image"] == image
    with pytest.raises(errors.NotFound, match="copy"):
        await copies.get_copy(registry.context, CAROL, UUID(made["id"]))
    with pytest.raises(errors.Forbidden):
        await copies.cancel_copy(registry.context, BOB, UUID(made["id"]))
