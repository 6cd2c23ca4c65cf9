"""Who may read an image besides its project, and who approved it: members of shared images, approval, verdicts on signatures."""

from __future__ import annotations

from broker.model import MemberStatus
from broker.service import members, vetting
from broker.web.call import Answer, Call, versioned

__all__ = ["add_member", "answer_member", "decide_vetting", "get_member", "get_vetting", "list_members", "remove_member", "tell_verdict"]


async def list_members(call: Call) -> Answer:
    return Answer(200, await members.list_members(call.context, call.client, call.id("image")))


async def add_member(call: Call) -> Answer:
    return Answer(201, await members.add_member(call.context, call.client, call.id("image"), call.body["member"]))


async def get_member(call: Call) -> Answer:
    return Answer(200, await members.get_member(call.context, call.client, call.id("image"), call.path["project"]))


async def answer_member(call: Call) -> Answer:
    status = MemberStatus(call.body["status"])
    return Answer(200, await members.answer_member(call.context, call.client, call.id("image"), call.path["project"], status))


async def remove_member(call: Call) -> Answer:
    await members.remove_member(call.context, call.client, call.id("image"), call.path["project"])
    return Answer(204)


async def get_vetting(call: Call) -> Answer:
    return versioned(await vetting.get_vetting(call.context, call.client, call.id("image")))


async def decide_vetting(call: Call) -> Answer:
    return versioned(await vetting.decide_vetting(call.context, call.client, call.id("image"), call.expected_version, call.body))


async def tell_verdict(call: Call) -> Answer:
    return Answer(201, await vetting.tell_verdict(call.context, call.client, call.id("image"), call.body))
