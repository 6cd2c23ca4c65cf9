"""Quotas: what projects may hold."""

from __future__ import annotations

from broker.service import quotas
from broker.web.call import Answer, Call

__all__ = ["delete_quota", "get_quota", "list_quotas", "set_quota"]


async def list_quotas(call: Call) -> Answer:
    return Answer(200, await quotas.list_quotas(call.context, call.client, call.query))


async def get_quota(call: Call) -> Answer:
    return Answer(200, await quotas.get_quota(call.context, call.client, call.path["project"]))


async def set_quota(call: Call) -> Answer:
    return Answer(200, await quotas.set_quota(call.context, call.client, call.path["project"], call.body))


async def delete_quota(call: Call) -> Answer:
    await quotas.delete_quota(call.context, call.client, call.path["project"])
    return Answer(204)
