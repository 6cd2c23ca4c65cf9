"""Copies: what agents are asked to put to other stores."""

from __future__ import annotations

from broker.service import copies
from broker.web.call import Answer, Call

__all__ = ["cancel_copy", "create_copy", "get_copy", "list_copies", "report_copy", "take_copy"]


async def list_copies(call: Call) -> Answer:
    return Answer(200, await copies.list_copies(call.context, call.client, call.query))


async def create_copy(call: Call) -> Answer:
    shown = await copies.create_copy(call.context, call.client, call.body, await call.claim())
    return Answer(201, shown, {"Location": f"/v1/copies/{shown['id']}"})


async def get_copy(call: Call) -> Answer:
    return Answer(200, await copies.get_copy(call.context, call.client, call.id("copy")))


async def cancel_copy(call: Call) -> Answer:
    await copies.cancel_copy(call.context, call.client, call.id("copy"))
    return Answer(204)


async def take_copy(call: Call) -> Answer:
    taken = await copies.take_copy(call.context, call.client, call.body)
    return Answer(204) if taken is None else Answer(200, taken)


async def report_copy(call: Call) -> Answer:
    return Answer(200, await copies.report_copy(call.context, call.client, call.id("copy"), call.body))
