"""Locations: where an image's bytes lie, as URLs; listed, added and removed, by their own API (2.17) and by JSON-patch.

Rules (Images API reference, "Locations"; OSSN-0065, OSSN-0090)
- What a URL may name, who may add it and who is shown it is decided by `broker.service.locations`. Glance fetches a new location's bytes
  to hash them, later; here the store has been looked at when the answer comes.
- A location's metadata is the name of its store, or nothing: nothing else is kept.
- Every URL of a patch is read before its first operation is carried out, and locations are patched apart from other attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from broker.errors import Conflict, Invalid
from broker.service import locations, visible
from broker.service.images import main_format
from broker.service.locations import Places, Shown
from broker.web.call import Answer, Call
from broker.web.glance import attributes, ids
from broker.web.glance.patch import Change

__all__ = ["glance_add_location", "glance_delete_from_store", "glance_list_locations"]


class _Wanted(NamedTuple):
    """A location as a client writes it."""

    url: str
    store: str | None
    digests: Mapping[str, str]


async def glance_list_locations(call: Call) -> Answer:
    found = await locations.list_locations(call.context, call.client, ids.image(call))
    return Answer(200, [_show(shown) for shown in found])


async def glance_add_location(call: Call) -> Answer:
    id, body = ids.image(call), call.body
    image = await visible.image(call.context, call.client, id)
    if image.status.value != "queued":
        raise Conflict(f"It's not allowed to add locations if image status is {image.status.value}.")
    digests = _digests(body.get("validation_data") or {})
    await locations.add_location(call.context, call.client, id, body["url"], digests)
    return Answer(202)


async def glance_delete_from_store(call: Call) -> Answer:
    await locations.remove_from_store(call.context, call.client, ids.image(call), call.path["store"])
    return Answer(204)


async def patch(call: Call, id: UUID, changes: Sequence[Change]) -> None:
    """Carry out what a patch says of locations, one after the other. Raises `Invalid`, `Conflict`, and what the service raises."""
    for change in changes:
        for each in _values(change):
            locations.check(call.context, call.client, each.url, each.digests, each.store)
    for change in changes:
        here = await locations.list_locations(call.context, call.client, id)
        if change.operation == "remove":
            await locations.remove_location(call.context, call.client, here[_position(change, len(here) - 1)])
            continue
        wanted = _values(change)
        if change.operation == "add" and change.path[1] != "-":
            _position(change, len(here))
        known = {shown.url for shown in here} if change.operation == "replace" else set()
        for each in wanted:
            if each.url not in known:
                await locations.add_location(call.context, call.client, id, each.url, each.digests, store=each.store)
        if change.operation == "replace":
            for shown in here:
                if shown.url not in {each.url for each in wanted}:
                    await locations.remove_location(call.context, call.client, shown)


async def show(call: Call, images: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Images as Glance shows them, from how the service does, with where their bytes lie."""
    bytes_of = {UUID(image["id"]): _bytes_of(image) for image in images}
    found = await locations.places(call.context, call.client, bytes_of)
    return [attributes.show(image, found[UUID(image["id"])].stores) | _more(found[UUID(image["id"])]) for image in images]


async def show_one(call: Call, image: Mapping[str, Any]) -> dict[str, Any]:
    return (await show(call, [image]))[0]


def _bytes_of(image: Mapping[str, Any]) -> UUID | None:
    format = main_format(image)
    return None if format is None else UUID(image["blobs"][format]["id"])


def _more(places: Places) -> dict[str, Any]:
    """Glance's notes on where an image is and is going. Clients patch locations only where they are shown, an empty list included."""
    shown: dict[str, Any] = {"locations": [_show(location) for location in places.locations]}
    if places.importing:
        shown["os_glance_importing_to_stores"] = ",".join(places.importing)
    if places.failed:
        shown["os_glance_failed_import"] = ",".join(places.failed)
    return shown


def _show(shown: Shown) -> dict[str, Any]:
    return {"url": shown.url, "metadata": {"store": shown.store}}


def _values(change: Change) -> list[_Wanted]:
    """The locations in an operation's value. Raises `Invalid`."""
    if change.operation == "remove":
        return []
    found = [_read(value) for value in ([change.value] if change.operation == "add" else change.value)]
    if len({wanted.url for wanted in found}) < len(found):
        raise Invalid("A location is given twice.", field="locations", expected="each URL once")
    return found


def _read(value: Mapping[str, Any]) -> _Wanted:
    metadata = value["metadata"]
    store = metadata.get("store")
    if metadata.keys() - {"store"} or not isinstance(store, str | None):
        raise Invalid("Of a location's metadata only its store is kept.", field="locations.metadata", expected='{} or {"store": NAME}')
    return _Wanted(value["url"], store, _digests(value.get("validation_data") or {}))


def _digests(validation: Mapping[str, str]) -> dict[str, str]:
    """What ``validation_data`` says of the bytes. Raises `Invalid` when its two sides do not agree."""
    digests = {}
    if "os_hash_algo" in validation:
        digests[validation["os_hash_algo"]] = validation["os_hash_value"].lower()
    checksum = validation.get("checksum")
    if checksum is not None and digests.setdefault("md5", checksum.lower()) != checksum.lower():
        raise Invalid("The image's MD5 is given twice, differently.", field="validation_data.checksum", expected=digests["md5"])
    return digests


def _position(change: Change, last: int) -> int:
    """The position that a pointer names, counted from 0. Raises `Conflict` where there is none."""
    text = change.path[1]
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise Invalid("This is no position of a location.", field="path", expected="/locations/N, or /locations/- for the end")
    if int(text) > last:
        raise Conflict(f"There is no location at position {text}.", field="path")
    return int(text)
