"""What was observed between sites and stores, to look at. Private stores appear only to whom they exist (M13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker import errors
from broker.catalog import path_pages
from broker.catalog.path_pages import PathRow
from broker.model import Client
from broker.service.context import Context
from broker.service.instants import instant
from broker.service.listing import limit_of, render_page


async def list_paths(context: Context, client: Client, query: Mapping[str, Any]) -> dict[str, Any]:
    """A page of paths, by site, store and direction. Raises `Invalid` for a marker that is none."""
    limit = limit_of(query)
    found = await path_pages.page(
        context.db,
        private=client.principal.sees_private_stores,
        limit=limit + 1,
        after=_after(query),
        site=query.get("site"),
        store=query.get("store"),
    )
    return render_page("paths", found, limit, _render, lambda row: f"{row.site} {row.store} {row.direction}")


def _after(query: Mapping[str, Any]) -> tuple[str, str, str]:
    """A marker names the last path of the page before; none of the three words has a space."""
    words = query["marker"].split(" ") if "marker" in query else ["", "", ""]
    if len(words) != 3:
        raise errors.Invalid("This marker is of no page of this list.", field="marker", expected="next, as the page before gave it")
    return words[0], words[1], words[2]


def _render(row: PathRow) -> dict[str, Any]:
    average = row.average
    return {
        "site": row.site or None,
        "store": row.store,
        "direction": row.direction,
        "rate": average.rate,
        "setup_seconds": average.setup_seconds,
        "success": min(1.0, average.success or 0.0),
        "weight": average.weight,
        "updated_at": instant(average.updated_at),
    }
