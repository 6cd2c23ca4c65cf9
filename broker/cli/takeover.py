"""What another image service's image becomes here: the image to be made, its locations, and what cannot be taken over. Pure.

Rules
- Ids stay (M6), and so do owner, visibility, members, tags, properties and formats. When an image was made cannot be said here.
- A location is kept when its URL, without user and password, names an object of a registered store; a place that Glance calls
  otherwise (its authentication address, a reference in its configuration) is mapped by whoever knows it: a URL's beginning to a store.
- Texts that are shown hold no user or password.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote
from uuid import UUID

from broker.errors import Invalid
from broker.model import DIGEST_HEX_LENGTH, Store
from broker.stores.location import locate, url_of

TAKEN = ("active", "deactivated", "queued")
"""Statuses of images that are taken over; the others are on their way somewhere."""

_ATTRIBUTES = frozenset(
    (
        "id", "name", "status", "visibility", "protected", "os_hidden", "checksum", "os_hash_algo", "os_hash_value", "owner", "size",
        "virtual_size", "container_format", "disk_format", "created_at", "updated_at", "tags", "direct_url", "min_ram", "min_disk", "self",
        "file", "stores", "schema", "locations", "members",
    )
)  # fmt: skip
_NOTES = "os_glance_"


@dataclass(frozen=True, slots=True)
class Location:
    """Where an object is by this broker's registrations."""

    store: str
    key: str


@dataclass(frozen=True, slots=True)
class Planned:
    """One image. `reason` says why it is left out; `unmapped` tells of locations that no store has."""

    id: str
    name: str
    size: int | None
    request: Mapping[str, Any] = field(default_factory=dict)
    """As POST /v1/images takes it."""
    members: Mapping[str, str] = field(default_factory=dict)
    """Project to ``pending``, ``accepted`` or ``rejected``."""
    digests: Mapping[str, str] = field(default_factory=dict)
    locations: tuple[Location, ...] = ()
    unmapped: tuple[str, ...] = ()
    deactivated: bool = False
    reason: str = ""


def plan(image: Mapping[str, Any], stores: Sequence[Store], mapped: Mapping[str, str]) -> Planned:
    """From an image as Glance shows it (with ``members``, project to status) to what is to be done. `mapped`: URL beginnings to store
    names."""
    id, name, size = str(image["id"]), image.get("name") or str(image["id"]), image.get("size")
    if image["status"] not in TAKEN:
        return Planned(id, name, size, reason=f"its status is {image['status']}")
    try:
        if str(UUID(id)) != id:
            raise ValueError
    except ValueError:
        return Planned(id, name, size, reason="its id is no UUID in lower case")
    locations, unmapped = [], []
    for entry in image.get("locations") or ():
        url = without_user(entry["url"])
        try:
            locations.append(_locate(url, stores, mapped))
        except Invalid:
            unmapped.append(url)
    reason = ""
    if image["status"] != "queued" and not locations:
        reason = "no registered store has its bytes" if unmapped else "its service shows no locations"
    return Planned(
        id, name, size, _request(image, id, name), dict(image.get("members") or {}), _digests(image), tuple(locations), tuple(unmapped),
        image["status"] == "deactivated", reason,
    )  # fmt: skip


def _request(image: Mapping[str, Any], id: str, name: str) -> dict[str, Any]:
    request: dict[str, Any] = {"id": id, "name": name, "visibility": image.get("visibility", "private")}
    for ours, theirs in (("project", "owner"), ("disk_format", "disk_format"), ("container_format", "container_format")):
        if image.get(theirs):
            request[ours] = image[theirs]
    for ours, theirs in (("protected", "protected"), ("hidden", "os_hidden"), ("min_disk", "min_disk"), ("min_ram", "min_ram")):
        if image.get(theirs):
            request[ours] = image[theirs]
    if image.get("tags"):
        request["tags"] = sorted(set(image["tags"]))
    properties = {key: value for key, value in image.items() if key not in _ATTRIBUTES and not key.startswith(_NOTES)}
    kept = {key: value for key, value in properties.items() if isinstance(value, str)}
    return request | ({"properties": kept} if kept else {})


def _digests(image: Mapping[str, Any]) -> dict[str, str]:
    """What the other service says that the bytes are; an algorithm that nobody here compares is left out."""
    said = {str(image.get("os_hash_algo")): image.get("os_hash_value"), "md5": image.get("checksum")}
    return {name: value.lower() for name, value in said.items() if name in DIGEST_HEX_LENGTH and value}


def _locate(url: str, stores: Sequence[Store], mapped: Mapping[str, str]) -> Location:
    """Raises `Invalid` when no store has this URL."""
    for beginning in sorted(mapped, key=len, reverse=True):
        prefix = without_user(beginning).rstrip("/") + "/"
        if url.startswith(prefix) and len(url) > len(prefix):
            (store,) = (store for store in stores if store.name == mapped[beginning])
            found = url_of(store, unquote(url[len(prefix) :]))
            if found is None:
                raise Invalid("Objects of this store have no URL.")
            url = found
            break
    place = locate(url, stores, internal=True)
    return Location(place.store.name, place.key)


def without_user(url: str) -> str:
    """The URL without user and password, also where a password was written with a bare slash, as old S3 locations were."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"
    _, colon, port = authority.rpartition(":")
    if colon and not port.isdecimal() and not port.endswith("]") and "@" in path:
        return f"{scheme}{separator}{path.partition('@')[2]}"
    return url
