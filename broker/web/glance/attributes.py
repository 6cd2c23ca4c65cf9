"""An image in Glance's words and in ours.

Glance has one flat object: attributes that it knows and properties, which are all other names. `read_new` and
`broker.web.glance.patch` turn what clients send into a request of the service; `show` turns the service's answer into what they expect.

Rules (Images API reference, "Create image", "Update image")
- What only the service sets is refused (403), as are reserved names. Properties are texts.
- A property that has an attribute's name, which the broker's own API allows, is not shown.
- An image without bytes has neither size nor hash, and one whose bytes nobody hashed has no hash: nothing is made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jsonschema_rs

from broker.errors import Forbidden, TooLarge
from broker.service.images import main_format
from broker.web.glance.documents import IMAGE_PROPERTIES, PROPERTY_NAME, PROPERTY_VALUE
from broker.web.validate import first_fault

MAX_PROPERTIES = 128
MAX_TAGS = 128

READ_ONLY = frozenset(("id", *(name for name, schema in IMAGE_PROPERTIES.items() if schema.get("readOnly"))))
RESERVED = frozenset(("location", "deleted", "deleted_at"))
RESERVED_PREFIX = "os_glance_"
"""Glance's own notes on an import under way."""

OURS: Mapping[str, str] = {
    "name": "name",
    "visibility": "visibility",
    "protected": "protected",
    "os_hidden": "hidden",
    "owner": "project",
    "tags": "tags",
    "min_ram": "min_ram",
    "min_disk": "min_disk",
    "container_format": "container_format",
    "disk_format": "disk_format",
}
"""Attributes that clients set, and how the service calls them."""


def _validator(schema: Mapping[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(dict(schema))


_ATTRIBUTE_ROOTS = {name: {"type": "object", "properties": {name: schema}} for name, schema in IMAGE_PROPERTIES.items()}
_ATTRIBUTES = {name: _validator(root) for name, root in _ATTRIBUTE_ROOTS.items()}
_PROPERTY_ROOT = {"type": "object", "propertyNames": PROPERTY_NAME, "additionalProperties": PROPERTY_VALUE}
_PROPERTY = _validator(_PROPERTY_ROOT)


def check_name(name: str) -> None:
    """Raises `Forbidden` for an attribute that clients do not set."""
    if name in READ_ONLY:
        raise Forbidden(f"Attribute '{name}' is read-only.")
    if name in RESERVED or name.startswith(RESERVED_PREFIX):
        raise Forbidden(f"Attribute '{name}' is reserved.")


def check_value(name: str, value: Any) -> None:
    """Raises `Invalid` for a value that an attribute or a property of that name cannot have."""
    validator, root = (_ATTRIBUTES[name], _ATTRIBUTE_ROOTS[name]) if name in _ATTRIBUTES else (_PROPERTY, _PROPERTY_ROOT)
    given = {name: value}
    if not validator.is_valid(given):
        raise first_fault(validator, given, root)


def read_new(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request that makes an image, from the body of POST. Raises `Forbidden`, `Invalid`, `TooLarge`."""
    request: dict[str, Any] = {"name": "", "visibility": "shared", "properties": {}}
    for name, value in body.items():
        if name != "id":
            check_name(name)
        check_value(name, value)
        if name == "id":
            request["id"] = value.lower()
        elif name == "locations":
            raise Forbidden("Locations are added to an image that exists.", field="locations")
        else:
            put(request, name, value)
    check_amount(request["properties"], request.get("tags", ()))
    return request


def put(request: dict[str, Any], name: str, value: Any) -> None:
    """Set an attribute or a property, in the service's words."""
    if name == "tags":
        request["tags"] = list(dict.fromkeys(value))
    elif name == "name":
        request["name"] = value or ""
    elif name in OURS:
        request[OURS[name]] = value
    else:
        request["properties"][name] = value


def check_amount(properties: Iterable[str], tags: Iterable[str]) -> None:
    """Raises `TooLarge` for too many (Glance's own answer to that is 413 too)."""
    for what, given, most in (("properties", properties, MAX_PROPERTIES), ("tags", tags, MAX_TAGS)):
        count = sum(1 for _ in given)
        if count > most:
            raise TooLarge(f"The limit has been exceeded on the number of allowed image {what}. Attempted: {count}, Maximum: {most}.")


def show(image: Mapping[str, Any], stores: Iterable[str] = ()) -> dict[str, Any]:
    """An image as Glance shows it, from how GET /v1/images/ID does. `stores`: where its bytes lie, as far as this principal may know."""
    format = main_format(image)
    blob = image["blobs"].get(format)
    digests = {} if blob is None else blob["digests"]
    algorithm = next((name for name in ("sha512", "sha256") if name in digests), None)
    path = f"/v2/images/{image['id']}"
    shown = {
        **{name: value for name, value in image["properties"].items() if name not in IMAGE_PROPERTIES},
        "id": image["id"],
        "name": image["name"] or None,
        "status": STATUSES[image["status"]],
        "visibility": image["visibility"],
        "protected": image["protected"],
        "os_hidden": image["hidden"],
        "checksum": digests.get("md5"),
        "os_hash_algo": algorithm,
        "os_hash_value": digests[algorithm] if algorithm is not None else None,
        "owner": image["project"],
        "size": None if blob is None else blob["size"],
        "virtual_size": None,
        "container_format": image["container_format"] or (None if blob is None else "bare"),
        "disk_format": image["disk_format"] or format or min(image["blobs"], default=None),
        "created_at": image["created_at"],
        "updated_at": image["updated_at"],
        "tags": image["tags"],
        "min_ram": image["min_ram"],
        "min_disk": image["min_disk"],
        "self": path,
        "file": f"{path}/file",
        "schema": "/v2/schemas/image",
    }
    if named := ",".join(stores):
        shown["stores"] = named
    return shown


STATUSES: Mapping[str, str] = {"queued": "queued", "pending": "deactivated", "active": "active", "deactivated": "deactivated"}
"""Our status in Glance's words: an image that waits for approval has its bytes, and gives them to nobody."""
