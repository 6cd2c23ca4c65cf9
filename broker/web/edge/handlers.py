"""Thin handlers of schemas/edge.json."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from broker import errors
from broker.model import TOKENS
from broker.service import carried, visible
from broker.service.images import main_format
from broker.web import redirect
from broker.web.call import Answer, Call
from broker.web.glance.download import negotiated
from broker.web.glance.images import found

__all__ = ["edge_begin_download", "edge_begin_upload", "edge_end_upload", "edge_fail_upload"]

_BYTES = "application/octet-stream"

_OF_NGINX = frozenset(("content-type", "content-length"))
"""What an edge says by itself, the length where it knows it."""

_RECORD = ("blob", *(f"record-{number}" for number in range(1, 8)))
_KNOWN = frozenset(("if-none-match", "x-object-meta-blob", *(f"{kind}-meta-{name}" for kind in ("x-amz", "x-broker") for name in _RECORD)))
"""The header fields of a PUT that deploy/nginx/edge.conf can pass on: nginx names each."""


async def edge_begin_upload(call: Call) -> Answer:
    given = call.headers
    if given.get("Edge-Content-Type", "").partition(";")[0].strip().lower() != _BYTES:
        raise errors.UnsupportedMediaType("The bytes of an image come as they are.", field="Content-Type", expected=_BYTES)
    length, said = given.get("Edge-Length"), given.get("X-Openstack-Image-Size")
    if length is not None and said is not None and length != said:
        raise errors.Invalid("The body has another length.", field="x-openstack-image-size", expected=str(length))
    if length == 0:
        raise errors.Invalid("An image of 0 bytes is not taken.", field="Content-Length", expected="at least one byte")
    image = (await found(call)).body
    if image["status"] != "queued":
        raise errors.Conflict(f"Image status transition from {image['status']} to saving is not allowed: the image has its bytes.")
    if image["disk_format"] is None or image["container_format"] is None:
        raise errors.Invalid("Properties disk_format, container_format must be set prior to saving data.")
    asked: dict[str, Any] = {"format": image["disk_format"]}
    if length is not None:
        asked["size"] = length
    if (store := given.get("X-Image-Meta-Store")) is not None:
        if visible.store(call.context, call.client, store) is None:
            raise errors.Invalid("No such store.", field="x-image-meta-store", expected="a store of GET /v2/info/stores")
        asked["only"] = [store]
    call.context.pace.count(call.client.principal.project, 1)
    place = await carried.begin(call.context, call.client, UUID(image["id"]), asked, staged=call.path["of"] == "stage")
    passed = {name: value for name, value in place.headers.items() if name.lower() not in _OF_NGINX}
    if any(name.lower() not in _KNOWN for name in passed):
        await carried.fail(call.context, place.ticket, "edge")
        raise errors.NoDestination("An edge cannot write to a store of this kind; ask POST /v1/tickets.")
    way = "spool" if length is None and not place.store.abilities.takes_unsized else "stream"
    fields = {f"Edge-{name}": value for name, value in passed.items()}
    return Answer(204, None, {"Edge-Ticket": place.ticket, "Edge-Way": way, "Edge-Url": place.url, "Cache-Control": "no-store", **fields})


async def edge_end_upload(call: Call) -> Answer:
    await carried.finish(call.context, call.headers.get("Edge-Ticket", ""), call.headers.get("X-Openstack-Image-Size"))
    return Answer(204)


async def edge_fail_upload(call: Call) -> Answer:
    await carried.fail(call.context, call.headers.get("Edge-Ticket", ""), call.query["by"])
    raise errors.StoreUnavailable("The bytes did not get to the store.")  # nginx makes another error of it


async def edge_begin_download(call: Call) -> Answer:
    image = (await found(call)).body
    format = main_format(image)
    if image["status"] == "queued" or format is None:
        return Answer(204, None, {"Edge-Way": "empty", "Cache-Control": "no-store"})
    stores = {store.name: store for store in visible.stores(call.context, call.client)}
    ticket = await negotiated(call, image, format, list(stores), call.headers.get("Edge-Prefer", ""), count=5)
    sources = redirect.openable(ticket)
    if not sources:
        raise errors.NoSource("No source can be opened by its URL alone; ask POST /v1/tickets, which tells the header fields too.")
    store = sources[0]["store"]
    way = {"Edge-Url": sources[0]["url"], "Cache-Control": "no-store"}
    if stores[store].settings.get(TOKENS) == "trusted":
        return Answer(204, None, {"Edge-Way": "redirect", **way})
    return Answer(204, None, {"Edge-Way": "read", "Edge-Ticket": ticket["id"], "Edge-Store": store, **way})
