"""Images: list, make, show, change, delete; their tags; and whether they are given out.

Whoever asks for what is no UUID is told that there is no such image. Deleting answers 204 whatever becomes of the bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

from broker.errors import Forbidden, Invalid, NotFound
from broker.service import carried, images
from broker.service.listing import Versioned
from broker.web.call import Answer, Call
from broker.web.glance import attributes, ids, locations, patch, search
from broker.web.glance.imports import METHODS
from broker.web.glance.info import known_stores

__all__ = [
    "glance_add_tag", "glance_create_image", "glance_deactivate_image", "glance_delete_image", "glance_delete_tag", "glance_get_image",
    "glance_list_images", "glance_reactivate_image", "glance_update_image",
]  # fmt: skip


async def glance_list_images(call: Call) -> Answer:
    wanted = search.read(call.query)
    page: dict[str, Any] = {"images": []} if wanted.limit == 0 else await images.search_images(call.context, call.client, wanted)
    shown = await locations.show(call, page["images"])
    return Answer(200, {"images": shown, **search.links(call.query, page.get("next"))})


async def glance_create_image(call: Call) -> Answer:
    request = attributes.read_new(call.body)
    made = await call.create(partial(images.create_image, call.context, call.client, request))
    shown = await locations.show_one(call, made.body)
    told = {"OpenStack-image-import-methods": ",".join(METHODS), "OpenStack-image-store-ids": ",".join(s.name for s in known_stores(call))}
    return Answer(201, shown, {"Location": shown["self"], **told})


async def glance_get_image(call: Call) -> Answer:
    image = (await found(call)).body
    shown = await locations.show_one(call, image)
    if shown["status"] == "queued":
        shown["status"] = await carried.progress(call.context, UUID(image["id"])) or "queued"
    return Answer(200, shown)


async def glance_update_image(call: Call) -> Answer:
    image = await found(call)
    media_type = call.media_type or patch.V21
    changes = patch.read(call.body, media_type)
    now = image.body
    if now["status"] == "queued" and patch.declares(changes):
        now = {**now, "status": await carried.progress(call.context, UUID(now["id"])) or "queued"}
    changed = patch.apply(now, changes, media_type)
    if changed.locations and changed.request:
        raise Invalid("Locations are patched apart from other attributes.", field="locations", expected="two requests")
    if changed.locations:
        await locations.patch(call, UUID(image.body["id"]), changed.locations)
        return Answer(200, await locations.show_one(call, (await found(call)).body))
    return Answer(200, await locations.show_one(call, await _change(call, image, changed.request)))


async def glance_delete_image(call: Call) -> Answer:
    await images.delete_image(call.context, call.client, ids.image(call), None)
    return Answer(204)


async def glance_deactivate_image(call: Call) -> Answer:
    return await _set_status(call, "deactivated")


async def glance_reactivate_image(call: Call) -> Answer:
    return await _set_status(call, "active")


async def glance_add_tag(call: Call) -> Answer:
    image = await found(call)
    tags, tag = image.body["tags"], call.path["tag"]
    attributes.check_value("tags", [tag])
    if tag not in tags:
        attributes.check_amount((), [*tags, tag])
        await _change(call, image, {"tags": [*tags, tag]})
    return Answer(204)


async def glance_delete_tag(call: Call) -> Answer:
    image = await found(call)
    tags, tag = image.body["tags"], call.path["tag"]
    if tag not in tags:
        raise NotFound("The image has no such tag.")
    await _change(call, image, {"tags": [other for other in tags if other != tag]})
    return Answer(204)


async def found(call: Call) -> Versioned:
    """The image in the path. Raises `NotFound`."""
    return await images.get_image(call.context, call.client, ids.image(call))


async def _change(call: Call, image: Versioned, request: dict[str, Any]) -> dict[str, Any]:
    """Change the image as it was read: of two who change it at once, the slower one gets 409."""
    if not request:
        return image.body
    return (await images.change_image(call.context, call.client, UUID(image.body["id"]), image.version, request)).body


async def _set_status(call: Call, status: str) -> Answer:
    image = await found(call)
    now = attributes.STATUSES[image.body["status"]]
    if now not in ("active", "deactivated"):
        raise Forbidden(f"Not allowed to change an image in status '{now}' to '{status}'.")
    await _change(call, image, {"status": status})
    return Answer(204)
