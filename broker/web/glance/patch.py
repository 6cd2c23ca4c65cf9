"""JSON-patch of images: from the operations that a client sends to what is to change of an image. Pure.

Rules (Images API reference, "Update image", media types ``application/openstack-images-v2.1-json-patch`` and ``…-v2.0-json-patch``)
- Only ``add``, ``remove`` and ``replace``. In v2.1 (RFC 6902's form, ``op`` and ``path``) an ``add`` replaces what is there; in v2.0
  (``{"add": PATH}``, draft 4) that is a conflict.
- A path is a JSON pointer (RFC 6901) to one attribute or property; only ``/locations`` has members: a position, or ``-`` for the end.
- What is read-only or reserved is 403, what is not there a conflict, and attributes are replaced, never removed.
- Operations apply one after the other, and all or none. Formats are declared before there are bytes, or some on their way.
- What concerns locations is told apart, in its order: stores decide it, not the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from broker.errors import Conflict, Forbidden, Invalid
from broker.web.glance.attributes import OURS, check_amount, check_name, check_value, put

V21 = "application/openstack-images-v2.1-json-patch"
V20 = "application/openstack-images-v2.0-json-patch"

OPERATIONS = ("add", "remove", "replace")
LOCATIONS = "locations"

_DEPTHS = {"add": 2, "remove": 2, "replace": 1}
"""Of pointers at locations."""

_WRONG_ESCAPE = re.compile(r"~(?![01])")
_DECLARED = ("disk_format", "container_format")


class Change(NamedTuple):
    """One operation. `value` is ``None`` for ``remove``."""

    operation: str
    path: tuple[str, ...]
    value: Any


class Patched(NamedTuple):
    """What a patch comes to: a request of the service that changes an image, ``{}`` for none, and the operations on locations."""

    request: dict[str, Any]
    locations: tuple[Change, ...]


def read(body: Sequence[Mapping[str, Any]], media_type: str) -> list[Change]:
    """The operations of a patch. Raises `Invalid` and `Forbidden`; fields are named as in ``2.path``."""
    return [_read_one(entry, f"{number}", media_type) for number, entry in enumerate(body)]


def _read_one(entry: Mapping[str, Any], where: str, media_type: str) -> Change:
    operation, pointer = _of_v20(entry, where) if media_type == V20 else _of_v21(entry, where)
    path = _path(pointer, f"{where}.{operation if media_type == V20 else 'path'}")
    depth = _DEPTHS[operation] if path[0] == LOCATIONS else 1
    if len(path) != depth:
        raise Invalid("Invalid JSON pointer for this resource.", field=where, expected=f"a pointer of {depth} steps")
    check_name(path[0])
    if operation == "remove":
        return Change(operation, path, None)
    if "value" not in entry:
        raise Invalid(f'Operation "{operation}" requires a member named "value".', field=f"{where}.value", expected="this field")
    value = entry["value"]
    check_value(path[0], value if depth == 1 else [value])
    return Change(operation, path, value)


def _of_v21(entry: Mapping[str, Any], where: str) -> tuple[str, Any]:
    operation = entry.get("op")
    if operation not in OPERATIONS:
        raise Invalid("Unable to find `op` in JSON Schema change.", field=f"{where}.op", expected=f"one of {', '.join(OPERATIONS)}")
    return operation, entry.get("path")


def _of_v20(entry: Mapping[str, Any], where: str) -> tuple[str, Any]:
    named = [name for name in OPERATIONS if name in entry]
    if len(named) != 1:
        raise Invalid(
            'Operation objects must contain exactly one member named "add", "remove", or "replace".',
            field=where,
            expected=f"exactly one of {', '.join(OPERATIONS)}",
        )
    return named[0], entry[named[0]]


def _path(pointer: Any, where: str) -> tuple[str, ...]:
    """The steps of a pointer (RFC 6901 section 4). Raises `Invalid`."""
    if not isinstance(pointer, str) or not pointer.startswith("/"):
        raise Invalid('A pointer begins with "/".', field=where, expected="a JSON pointer, such as /name")
    if _WRONG_ESCAPE.search(pointer):
        raise Invalid('The pointer has a "~" that is no escape.', field=where, expected="~0 for ~ and ~1 for /")
    steps = tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer[1:].split("/"))
    if not all(step.strip() for step in steps):
        raise Invalid("The pointer has an empty step.", field=where, expected="a JSON pointer, such as /name")
    return steps


def declares(changes: Iterable[Change]) -> bool:
    """Whether a patch says in which format the bytes are to come."""
    return any(change.path[0] in _DECLARED for change in changes)


def apply(image: Mapping[str, Any], changes: Iterable[Change], media_type: str) -> Patched:
    """What `changes` come to for `image`, as GET /v1/images/ID shows it. Raises `Conflict`, `Forbidden`, `TooLarge`."""
    properties = dict(image["properties"])
    request: dict[str, Any] = {"properties": {}}
    locations: list[Change] = []
    for change in changes:
        name = change.path[0]
        if name == LOCATIONS:
            locations.append(change)
            continue
        if name in OURS:
            _check_attribute(image, change, media_type)
        else:
            _check_property(properties, change, media_type)
        if change.operation == "remove":
            del properties[name]
            request["properties"][name] = None
        else:
            if name not in OURS:
                properties[name] = change.value
            put(request, name, change.value)
    # A property that came and went again is none to remove.
    request["properties"] = {
        name: value for name, value in request["properties"].items() if value is not None or name in image["properties"]
    }
    check_amount(properties, request.get("tags", ()))
    if not request["properties"]:
        del request["properties"]
    return Patched(request, tuple(locations))


def _check_attribute(image: Mapping[str, Any], change: Change, media_type: str) -> None:
    name = change.path[0]
    if change.operation == "remove":
        raise Forbidden(f"Property {name} may not be removed.")
    if change.operation == "add" and media_type == V20:
        raise Conflict(f"Property {name} already present.")
    if name in _DECLARED and image["status"] != "queued" and change.value != image[name]:
        raise Forbidden(f"Attribute {name} can be only replaced for a queued image.")


def _check_property(properties: Mapping[str, str], change: Change, media_type: str) -> None:
    name = change.path[0]
    if change.operation == "add":
        if name in properties and media_type == V20:
            raise Conflict(f"Property {name} already present.")
    elif name not in properties:
        raise Conflict(f"Property {name} does not exist.")
