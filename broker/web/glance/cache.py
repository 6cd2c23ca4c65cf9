"""The cache (versions 2.14 and 2.18): replicas of purpose ``cache``, and what is queued to become such (`broker.service.cache`).

Glance tells how often a cached image was read and when last; replicas do not know that, so hits are ``null`` and the time is 0, which
python-glanceclient shows as unknown and openstackclient as 1970.
"""

from __future__ import annotations

from broker.errors import Invalid
from broker.service import cache
from broker.web.call import Answer, Call
from broker.web.glance import ids

__all__ = [
    "glance_clean_cache", "glance_clear_cache", "glance_get_cache", "glance_list_cache_nodes", "glance_prune_cache", "glance_queue_image",
    "glance_remove_cached",
]  # fmt: skip

_TARGET = "x-image-cache-clear-target"


async def glance_get_cache(call: Call) -> Answer:
    state = await cache.state(call.context, call.client)
    cached = [
        {"image_id": str(each.image), "hits": None, "last_accessed": 0, "last_modified": each.at, "size": each.size}
        for each in state.cached
    ]
    return Answer(200, {"cached_images": cached, "queued_images": [str(id) for id in state.queued]})


async def glance_queue_image(call: Call) -> Answer:
    await cache.queue(call.context, call.client, ids.image(call))
    return Answer(202)


async def glance_remove_cached(call: Call) -> Answer:
    await cache.remove(call.context, call.client, ids.image(call))
    return Answer(204)


async def glance_clear_cache(call: Call) -> Answer:
    target = call.headers.get(_TARGET, "").lower()
    if target not in ("", "cache", "queue"):
        raise Invalid("The cache has no such part.", field=_TARGET, expected="cache or queue; both without it")
    if target != "cache":
        await cache.clear_queue(call.context)
    if target != "queue":
        await cache.clear_cache(call.context, call.client)
    return Answer(204)


async def glance_clean_cache(call: Call) -> Answer:
    await cache.clean(call.context, call.client)
    return Answer(200)


async def glance_prune_cache(call: Call) -> Answer:
    pruned = await cache.prune(call.context, call.client)
    return Answer(200, {"total_files_pruned": pruned.files, "total_bytes_pruned": pruned.bytes})


async def glance_list_cache_nodes(call: Call) -> Answer:
    return Answer(200, await cache.nodes(call.context, call.client, ids.image(call)))
