"""What this service can do and holds: its stores, the ways to import, and what a project uses.

Rules
- Stores are those that the principal may know. None is the default: which store takes an upload is ranked for each.
- There is no quota on images: -1, as Glance says of one that is unlimited.
"""

from __future__ import annotations

from typing import Any

from broker.model import Store
from broker.service import usage, visible
from broker.web.call import Answer, Call
from broker.web.glance.imports import METHODS

__all__ = ["glance_get_import_info", "glance_get_store_details", "glance_get_stores", "glance_get_usage"]

_MEBIBYTE = 1 << 20
_TOLD = ("bucket", "container")
"""Settings that say nothing secret, and which Glance's administrators look for."""


async def glance_get_import_info(call: Call) -> Answer:
    return Answer(200, {"import-methods": {"description": "Import methods available.", "type": "array", "value": list(METHODS)}})


async def glance_get_stores(call: Call) -> Answer:
    return Answer(200, {"stores": [_store(store) for store in known_stores(call)]})


async def glance_get_store_details(call: Call) -> Answer:
    return Answer(200, {"stores": [_store(store) | _details(store) for store in known_stores(call)]})


async def glance_get_usage(call: Call) -> Answer:
    found = await usage.usage(call.context, call.client)
    used = {
        "image_size_total": -(-found.bytes // _MEBIBYTE),
        "image_stage_total": -(-found.uploading_bytes // _MEBIBYTE),
        "image_count_total": found.images,
        "image_count_uploading": found.uploads,
    }
    return Answer(200, {"usage": {name: {"usage": number, "limit": -1} for name, number in used.items()}})


def known_stores(call: Call) -> list[Store]:
    """The stores that this principal may know and use, by name."""
    return [store for store in visible.stores(call.context, call.client) if store.enabled]


def _store(store: Store) -> dict[str, Any]:
    shown = {"id": store.name, "description": f"{store.kind} at {store.site}"}
    return shown if store.writable else shown | {"read-only": "true"}


def _details(store: Store) -> dict[str, Any]:
    properties = {name: store.settings[name] for name in _TOLD if name in store.settings}
    return {"type": store.kind, "weight": 0, "properties": {"site": store.site, "endpoint": store.endpoint, **properties}}
