"""Members: the projects that a shared image is shared with.

Who may do what is decided by the service (`broker.service.members`), by the rules of the Images API reference, section "Sharing". A
member whom nobody may show to the asker does not exist (404), as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker.errors import Forbidden, NotFound
from broker.model import MemberStatus
from broker.service import members
from broker.web.call import Answer, Call
from broker.web.glance import ids

__all__ = ["glance_add_member", "glance_delete_member", "glance_get_member", "glance_list_members", "glance_update_member"]


async def glance_list_members(call: Call) -> Answer:
    id = ids.image(call)
    found = await members.list_members(call.context, call.client, id)
    return Answer(200, {"members": [_show(str(id), member) for member in found["members"]], "schema": "/v2/schemas/members"})


async def glance_add_member(call: Call) -> Answer:
    id = ids.image(call)
    return Answer(200, _show(str(id), await members.add_member(call.context, call.client, id, call.body["member"])))


async def glance_get_member(call: Call) -> Answer:
    id = ids.image(call)
    try:
        return Answer(200, _show(str(id), await members.get_member(call.context, call.client, id, call.path["member_id"])))
    except Forbidden as error:
        raise NotFound(error.detail) from None


async def glance_update_member(call: Call) -> Answer:
    id, status = ids.image(call), MemberStatus(call.body["status"])
    return Answer(200, _show(str(id), await members.answer_member(call.context, call.client, id, call.path["member_id"], status)))


async def glance_delete_member(call: Call) -> Answer:
    await members.remove_member(call.context, call.client, ids.image(call), call.path["member_id"])
    return Answer(204)


def _show(image: str, member: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_id": image,
        "member_id": member["member"],
        "status": member["status"],
        "created_at": member["created_at"],
        "updated_at": member["updated_at"],
        "schema": "/v2/schemas/member",
    }
