"""Imports: the ways in which an image's bytes come to stores without its client bringing them there; and how each of them goes.

Rules
- ``glance-direct`` commits what an edge has staged (`broker.service.carried`), in the format that was declared when it came.
- ``copy-image`` asks for copies, which agents make (`broker.service.copies`): one for each store, each on its own, so that a request that
  all of them succeed or none is refused.
- ``web-download`` and ``glance-download`` are refused: the broker opens no address that a user names.
- A task is a copy: Glance's tasks of an image are the copies that were asked for it.
"""

from __future__ import annotations

from typing import Any

from broker.errors import Conflict, Invalid, NotFound
from broker.model import Image, ImageStatus, Purpose, new_id
from broker.service import carried, copies, locations, visible
from broker.web.call import Answer, Call
from broker.web.glance import ids

__all__ = ["glance_import_image", "glance_list_image_tasks"]

METHODS = ("glance-direct", "copy-image")

_STATUSES = {"queued": "pending", "running": "processing", "done": "success", "failed": "failure"}
_MESSAGES = {"queued": "Waits for an agent", "running": "Copied {bytes} of {size} bytes", "done": "Copied", "failed": "Failed: {problem}"}


async def glance_import_image(call: Call) -> Answer:
    method = call.body["method"]["name"]
    if method not in METHODS:
        raise Invalid("This import method is not offered.", field="method.name", expected=" or ".join(METHODS))
    image = await visible.image(call.context, call.client, ids.image(call))
    if method == "glance-direct":
        await _take_staged(call, image)
    else:
        await _ask_for_copies(call, image)
    return Answer(202)


async def glance_list_image_tasks(call: Call) -> Answer:
    id = ids.image(call)
    image = await visible.image(call.context, call.client, id)
    page = await copies.list_copies(call.context, call.client, {"image": str(id), "limit": 1000})
    return Answer(200, {"tasks": [_task(copy, image.project) for copy in page["copies"]]})


async def _take_staged(call: Call, image: Image) -> None:
    """Make what is staged the image's bytes. Which store has them was ranked when they came."""
    if call.body.get("stores") or call.body.get("all_stores") or "X-Image-Meta-Store" in call.headers:
        raise Invalid("The staged bytes lie at a store already.", field="stores", expected="none; copy-image brings them to others")
    try:
        await carried.import_staged(call.context, call.client, image.id)
    except NotFound as error:
        raise Conflict(error.detail or "Nothing is staged for this image.") from None


async def _ask_for_copies(call: Call, image: Image) -> None:
    if call.body.get("all_stores_must_succeed"):
        raise Invalid("Copies are made one by one.", field="all_stores_must_succeed", expected="false")
    if image.status is not ImageStatus.ACTIVE:
        raise Conflict(f"Only images with status active can be targeted for copying; this one is {image.status.value}.")
    bytes_of = {image.id: image.blobs.get(await locations.main_format(call.context, image))}
    there = (await locations.places(call.context, call.client, bytes_of))[image.id].stores
    wanted = [name for name in _wanted(call) if name not in there]
    if not wanted:
        raise Invalid("The image is in each of these stores already.", field="stores", expected="a store without it")
    for store in wanted:
        await copies.ask(call.context, call.client, image, store, Purpose.ORIGIN, id=new_id(call.context.clock()))


def _wanted(call: Call) -> list[str]:
    """The stores that a request names. Raises `Invalid` for one that takes no copies from this principal, or does not exist."""
    possible = [store.name for store in copies.targets(call.context, call.client)]
    if call.body.get("all_stores"):
        return possible
    named: list[str] = call.body.get("stores") or [name for name in (call.headers.get("X-Image-Meta-Store"),) if name]
    if not named:
        raise Invalid("No store is named.", field="stores", expected="names of stores, or all_stores: true")
    for name in named:
        if name not in possible:
            raise Invalid("There is no such store to copy to.", field="stores", expected="names from GET /v2/info/stores")
    return list(dict.fromkeys(named))


def _task(copy: dict[str, Any], owner: str) -> dict[str, Any]:
    """A copy as a task (Images API reference, "Show tasks associated with image")."""
    told = _MESSAGES[copy["state"]].format(bytes=copy["bytes"], size=copy.get("size", "?"), problem=copy.get("problem", ""))
    return {
        "id": copy["id"],
        "type": "api_image_import",
        "status": _STATUSES[copy["state"]],
        "image_id": copy["image"],
        "message": told,
        "input": {"import_req": {"method": {"name": "copy-image"}, "stores": [copy["store"]]}},
        "result": None,
        "owner": owner,
        "user_id": None,
        "request_id": None,
        "created_at": copy["created_at"],
        "updated_at": copy["updated_at"],
        "expires_at": None,
    }
