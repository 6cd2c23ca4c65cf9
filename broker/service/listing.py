"""Pages, versions and markers: what all lists and changes have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from broker import errors

LIMIT = 100
"""How many things a page holds unless the request says."""

Item = TypeVar("Item")


class Versioned(NamedTuple):
    """An answer with its version; its ETag is ``"VERSION"``."""

    body: dict[str, Any]
    version: int


def limit_of(query: Mapping[str, Any]) -> int:
    """How many things to show; one more is read, to know whether there is a next page."""
    return int(query.get("limit", LIMIT))


def render_page(
    name: str, items: Sequence[Item], limit: int, render: Callable[[Item], Any], marker: Callable[[Item], str]
) -> dict[str, Any]:
    """Up to `limit` of `items` under `name`, with ``next`` when there are more."""
    page: dict[str, Any] = {name: [render(item) for item in items[:limit]]}
    if len(items) > limit:
        page["next"] = marker(items[limit - 1])
    return page


def id_marker(query: Mapping[str, Any]) -> UUID | None:
    """Where a page begins that is ordered by ids. Raises `Invalid`."""
    marker = query.get("marker")
    if marker is None:
        return None
    try:
        return UUID(marker)
    except ValueError:
        raise errors.Invalid(
            "This marker is of no page of this list.", field="marker", expected="next, as the page before gave it"
        ) from None
