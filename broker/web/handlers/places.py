"""Stores, sites, and the paths between them."""

from __future__ import annotations

from functools import partial
from urllib.parse import quote

from broker.service import paths, sites, stores
from broker.web.call import Answer, Call, versioned

__all__ = [
    "change_site", "change_store", "create_site", "create_store", "delete_site", "delete_store", "get_site", "get_store",
    "list_paths", "list_sites", "list_stores", "probe_store",
]  # fmt: skip


async def list_stores(call: Call) -> Answer:
    return Answer(200, await stores.list_stores(call.context, call.client, call.query))


async def create_store(call: Call) -> Answer:
    found = await call.create(partial(stores.create_store, call.context, call.client, call.body))
    return versioned(found, 201, f"/v1/stores/{found.body['name']}")


async def get_store(call: Call) -> Answer:
    return versioned(await stores.get_store(call.context, call.client, call.path["store"]))


async def change_store(call: Call) -> Answer:
    return versioned(await stores.change_store(call.context, call.client, call.path["store"], call.expected_version, call.body))


async def delete_store(call: Call) -> Answer:
    await stores.delete_store(call.context, call.client, call.path["store"], call.expected_version)
    return Answer(204)


async def probe_store(call: Call) -> Answer:
    await call.claim()
    return versioned(await stores.probe_store(call.context, call.client, call.path["store"]))


async def list_sites(call: Call) -> Answer:
    return Answer(200, await sites.list_sites(call.context, call.client, call.query))


async def create_site(call: Call) -> Answer:
    found = await call.create(partial(sites.create_site, call.context, call.client, call.body))
    return versioned(found, 201, f"/v1/sites/{quote(found.body['path'], safe='')}")


async def get_site(call: Call) -> Answer:
    return versioned(await sites.get_site(call.context, call.client, call.path["site"]))


async def change_site(call: Call) -> Answer:
    return versioned(await sites.change_site(call.context, call.client, call.path["site"], call.expected_version, call.body))


async def delete_site(call: Call) -> Answer:
    await sites.delete_site(call.context, call.client, call.path["site"], call.expected_version)
    return Answer(204)


async def list_paths(call: Call) -> Answer:
    return Answer(200, await paths.list_paths(call.context, call.client, call.query))
