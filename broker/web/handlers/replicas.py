"""Replicas: where copies of a blob lie."""

from __future__ import annotations

from functools import partial

from broker.service import adopt, replicas
from broker.web.call import Answer, Call, versioned

__all__ = ["adopt_object", "change_replica", "delete_replica", "get_replica", "list_blob_replicas", "list_replicas", "register_replica"]


async def list_blob_replicas(call: Call) -> Answer:
    return Answer(200, await replicas.list_blob_replicas(call.context, call.client, call.id("blob")))


async def register_replica(call: Call) -> Answer:
    found = await call.create(partial(replicas.register_replica, call.context, call.client, call.id("blob"), call.body))
    return versioned(found, 201, f"/v1/replicas/{found.body['id']}")


async def adopt_object(call: Call) -> Answer:
    found = await call.create(partial(adopt.adopt_object, call.context, call.client, call.id("image"), call.body))
    return versioned(found, 201, f"/v1/replicas/{found.body['id']}")


async def list_replicas(call: Call) -> Answer:
    return Answer(200, await replicas.list_replicas(call.context, call.client, call.query))


async def get_replica(call: Call) -> Answer:
    return versioned(await replicas.get_replica(call.context, call.client, call.id("replica")))


async def change_replica(call: Call) -> Answer:
    return versioned(await replicas.change_replica(call.context, call.client, call.id("replica"), call.expected_version, call.body))


async def delete_replica(call: Call) -> Answer:
    await replicas.delete_replica(call.context, call.client, call.id("replica"), call.expected_version)
    return Answer(204)
