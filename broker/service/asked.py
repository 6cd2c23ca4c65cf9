"""What a request for a ticket says, read for this client, and the parts of an answer that every kind of ticket shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker import errors, formats, rank
from broker.model import Client
from broker.service import visible
from broker.service.context import Context
from broker.service.instants import instant


class Wishes(NamedTuple):
    """What a request says beside what it is for."""

    site: str | None
    prefer: frozenset[str]
    avoid: frozenset[str]
    schemes: frozenset[str]


_ANY: frozenset[str] = frozenset()
_WISHES = frozenset(("site", "prefer", "avoid", "only", "schemes"))


def has_wishes(request: Mapping[str, Any]) -> bool:
    """Whether there is anything in a request for `wishes` to read: most have nothing."""
    return not _WISHES.isdisjoint(request)


def wishes(context: Context, client: Client, request: Mapping[str, Any], stores: Iterable[str]) -> Wishes:
    """The wishes of a request for what lies at `stores`. Raises `Invalid`."""
    return Wishes(
        site_of(context, client, request),
        store_names(context, client, request, "prefer"),
        avoided(context, client, request, stores),
        frozenset(request.get("schemes", ())),
    )


def site_of(context: Context, client: Client, request: Mapping[str, Any]) -> str | None:
    """Where the client is: proven by its token or network, else as it says itself. Raises `Invalid`."""
    hint = request.get("site")
    if hint is not None and not context.memory.has_site(hint):
        raise errors.Invalid("No such site.", field="site", expected="a site of GET /v1/sites, or one below it")
    return client.site or hint


def store_names(context: Context, client: Client, request: Mapping[str, Any], field: str) -> frozenset[str]:
    """The stores named in a field. Raises `Invalid` for one that does not exist, or that this principal may not know: the same."""
    names = request.get(field)
    if not names:
        return _ANY
    for index, name in enumerate(names):
        if visible.store(context, client, name) is None:
            raise errors.Invalid("No such store.", field=f"{field}.{index}", expected="a store of GET /v1/stores")
    return frozenset(names)


def avoided(context: Context, client: Client, request: Mapping[str, Any], candidates: Iterable[str]) -> frozenset[str]:
    """Stores to leave out: those of `avoid`, and all but those of `only`. Raises `Invalid`."""
    avoid = store_names(context, client, request, "avoid")
    only = store_names(context, client, request, "only")
    return avoid | (frozenset(candidates) - only) if only else avoid


def excluded(exclusions: Iterable[rank.Exclusion]) -> list[dict[str, str]]:
    """The exclusions that this principal may know of, each with its reason (invariant 10)."""
    return [{"store": candidate.store, "reason": reason} for candidate, reason in exclusions]


def considered(choice: formats.Choice) -> list[dict[str, Any]]:
    """The formats that could have been chosen, best first, as JSON."""
    return [
        {"format": format, "seconds": seconds, "conversion_seconds": converting, "full": is_full}
        for format, seconds, converting, is_full in choice.considered
    ]


def conversion(format: str | None, formats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a ticket says of converting: how long it takes the client, and what else was considered."""
    return {"seconds": next((each["conversion_seconds"] for each in formats if each["format"] == format), 0.0), "formats": formats}


def parsed(ticket: Mapping[str, Any]) -> dict[str, Any]:
    """A ticket as plain values, for who renders it in other words: parts of it are JSON already (`negotiate`)."""
    plain: dict[str, Any] = orjson.loads(orjson.dumps(ticket))
    return plain


def render_download(
    id: UUID | str,
    state: str,
    summary: str,
    image: UUID | None,
    format: str | None,
    expires_at: float,
    sources: Sequence[Any] | orjson.Fragment,
    out: Sequence[Any],
) -> dict[str, Any]:  # fmt: skip
    """A download ticket as JSON; `summary` is its blob's (`compact.CompactBlob`)."""
    shown = {
        "id": str(id),
        "operation": "download",
        "state": state,
        "blob": orjson.Fragment(summary),
        "expires_at": instant(expires_at),
        "sources": sources,
        "excluded": out,
    }
    if image is not None:
        shown["image"] = str(image)
    if format is not None:
        shown["format"] = format
    return shown
