"""Images and their blobs."""

from __future__ import annotations

from functools import partial

from broker.service import blobs, images
from broker.web.call import Answer, Call, versioned

__all__ = ["change_image", "create_image", "delete_image", "get_blob", "get_image", "list_images"]


async def list_images(call: Call) -> Answer:
    return Answer(200, await images.list_images(call.context, call.client, call.query))


async def create_image(call: Call) -> Answer:
    found = await call.create(partial(images.create_image, call.context, call.client, call.body))
    return versioned(found, 201, f"/v1/images/{found.body['id']}")


async def get_image(call: Call) -> Answer:
    return versioned(await images.get_image(call.context, call.client, call.id("image")))


async def change_image(call: Call) -> Answer:
    return versioned(await images.change_image(call.context, call.client, call.id("image"), call.expected_version, call.body))


async def delete_image(call: Call) -> Answer:
    return Answer(200, await images.delete_image(call.context, call.client, call.id("image"), call.expected_version))


async def get_blob(call: Call) -> Answer:
    return Answer(200, await blobs.get_blob(call.context, call.client, call.id("blob")))
