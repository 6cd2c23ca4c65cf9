"""The query of ``GET /v2/images``: from Glance's words to a search, and to the links of its pages. Pure.

Rules (Images API reference, "List images")
- ``name``, ``id``, ``status`` and the formats take ``in:A,B`` (values with commas in double quotes), instants a comparison such as
  ``gte:2026-01-01T00:00:00Z``. ``size_min`` and its like are bounds. Every parameter without a meaning is a property's name.
- Sorting is ``sort=name:asc,size`` or ``sort_key`` with ``sort_dir``; the newest comes first where nothing is said.
- Hidden images are listed only with ``os_hidden=true``, and then nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import urlencode
from uuid import UUID

from broker.catalog.image_search import Comparison, Condition, Search
from broker.errors import Invalid

LIMIT = 25
MAX_LIMIT = 1000
"""Images on a page: when the request does not say, and at most, as Glance has them by default."""

PATH = "/v2/images"
SORT_KEYS = ("name", "status", "container_format", "disk_format", "size", "id", "created_at", "updated_at")

_LISTS = ("name", "id", "status", "container_format", "disk_format")
_EQUAL = {"owner": "project", "checksum": "md5", "os_hash_value": "sha"}
_NUMBERS = ("size", "min_disk", "min_ram")
_BOUNDS: Mapping[str, Comparison] = {"": "eq", "_min": "gte", "_max": "lte"}
_FLAGS = ("protected",)
_INSTANTS = ("created_at", "updated_at")
_ORDERS = ("eq", "neq", "gt", "gte", "lt", "lte")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(?:,|$)|([^",]*)(?:,|$)')
_MAX_BIGINT = (1 << 63) - 1


def read(query: Mapping[str, Any]) -> Search:
    """The search that a checked query stands for. Raises `Invalid`."""
    conditions = [
        Condition("hidden", "eq", query.get("os_hidden", "false").lower() == "true"),
        *(_listed(name, query[name]) for name in _LISTS if name in query),
        *(Condition(ours, "eq", query[name]) for name, ours in _EQUAL.items() if name in query),
        *(
            Condition(name, comparison, _number(name + suffix, query[name + suffix]))
            for name in _NUMBERS
            for suffix, comparison in _BOUNDS.items()
            if name + suffix in query
        ),
        *(Condition(name, "eq", query[name].lower() == "true") for name in _FLAGS if name in query),
        *(_instant(name, query[name]) for name in _INSTANTS if name in query),
    ]
    answer = query.get("member_status", "accepted")
    return Search(
        limit=min(query.get("limit", LIMIT), MAX_LIMIT),
        conditions=tuple(conditions),
        properties=query.get("properties", {}),
        tags=tuple(query.get("tag", ())),
        visibility=query.get("visibility"),
        member_status=None if answer == "all" else answer,
        sort=_sort(query),
        marker=_marker(query.get("marker")),
    )


def links(query: Mapping[str, Any], next: str | None) -> dict[str, str]:
    """Where the first page of this list is, and the next where there is one."""
    asked = {name: value for name, value in query.items() if name not in ("marker", "properties")} | dict(query.get("properties", {}))
    found = {"first": _link(asked), "schema": "/v2/schemas/images"}
    if next is not None:
        found["next"] = _link(asked | {"marker": next})
    return found


def _link(asked: Mapping[str, Any]) -> str:
    return f"{PATH}?{urlencode(asked, doseq=True)}" if asked else PATH


def values_of(text: str) -> list[str]:
    """The values of an ``in:``: separated by commas, those with commas in double quotes. Raises `Invalid` for a quote that does not end."""
    found, at = [], 0
    while at < len(text):
        match = _QUOTED.match(text, at)
        if match is None or match.end() == at:
            raise Invalid(
                "The value is not allowed here.", expected='values with commas, in double quotes where they hold some: in:a,"b,c"'
            )
        found.append(re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2])
        at = match.end()
    return found


def _listed(name: str, text: str) -> Condition:
    operator, separator, rest = text.partition(":")
    if not separator:
        return Condition(name, "eq", text)
    if operator == "in":
        return Condition(name, "in", values_of(rest))
    if operator == "eq":
        return Condition(name, "eq", rest)
    raise Invalid(f"Unable to filter {name} by an unknown operator.", field=name, expected="a value, eq:VALUE or in:VALUE,VALUE")


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or abs(int(text)) > _MAX_BIGINT:
        raise Invalid("Unable to filter on a range with a non-numeric value.", field=name, expected="a number")
    return int(text)


def _instant(name: str, text: str) -> Condition:
    operator, _, rest = text.partition(":")
    comparison, given = (operator, rest) if operator in _ORDERS else ("eq", text)
    try:
        at = datetime.fromisoformat(given)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise Invalid(
            "Use ISO 8601 DateTime notation.", field=name, expected="such as gte:2026-01-01T00:00:00Z, with one of " + ", ".join(_ORDERS)
        ) from None
    return Condition(name, cast(Comparison, comparison), at)


def _sort(query: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    keys, directions = query.get("sort_key", []), query.get("sort_dir", [])
    if "sort" in query:
        if keys or directions:
            raise Invalid("Old and new sorting syntax cannot be combined.", field="sort", expected="sort, or sort_key and sort_dir")
        pairs = [entry.partition(":")[::2] for entry in query["sort"].split(",")]
        keys, directions = [key.strip() for key, _ in pairs], [direction.strip() or "desc" for _, direction in pairs]
    keys, directions = keys or ["created_at"], directions or ["desc"]
    if len(directions) == 1:
        directions = directions * len(keys)
    if len(directions) != len(keys):
        raise Invalid(
            "Number of sort dirs does not match the number of sort keys.", field="sort_dir", expected="one, or one for each sort_key"
        )
    for key, direction in zip(keys, directions, strict=True):
        if key not in SORT_KEYS:
            raise Invalid("Invalid sort key.", field="sort", expected="one of " + ", ".join(SORT_KEYS))
        if direction not in ("asc", "desc"):
            raise Invalid("Invalid sort direction.", field="sort", expected="asc or desc")
    if len(set(keys)) != len(keys):
        raise Invalid("A sort key is given twice.", field="sort", expected="each key once")
    return tuple((key, direction == "desc") for key, direction in zip(keys, directions, strict=True))


def _marker(text: str | None) -> UUID | None:
    if text is None:
        return None
    try:
        return UUID(text)
    except ValueError:
        raise Invalid("No such image.", field="marker", expected="the id of the last image of the page before") from None
