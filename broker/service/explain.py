"""Why a ticket would name what it names: the decision about a download without lease, record or signature.

Rules
- The numbers are those of this moment, from the catalogue and the averages as a ticket would use them; the order is by share, not drawn.
- Whoever asks learns what his tickets would tell him, and no more: a blob that he may not read does not exist, nor does a private store.
- Only administrators ask for another site than their own; to others `site` is the hint that it is for a ticket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from broker import accept, errors, formats, rank
from broker.catalog import images, views
from broker.catalog.connect import reachable
from broker.catalog.tickets import TicketRecord
from broker.catalog.views import BlobView
from broker.model import Client, Direction, Operation, Role
from broker.paths import IDLE
from broker.permit import may_read_blob, may_see_store
from broker.service import asked, locate, places
from broker.service.context import Context
from broker.service.summary import summary


async def explain(context: Context, client: Client, request: Mapping[str, Any]) -> dict[str, Any]:
    """Every candidate with its numbers, every exclusion with its reason. Raises `NotFound`, `Forbidden`, `Invalid`, `NoSource`."""
    failed_until = await context.memory.failures_of(client.name)
    looked_at = [
        (named, *_ranked(context, client, request, named["view"], failed_until)) for named in await _named(context, client, request)
    ]
    options = [_option(context, named, ranking) for named, ranking, _ in looked_at]
    choice = formats.choose(options, request.get("formats", ()), request["convert"]) if "convert" in request else None
    named, ranking, site = looked_at[choice.chosen if choice is not None else 0]
    ranked = sorted(ranking.sources, key=lambda source: -source.weight)
    answer = {
        "blob": summary(named["view"].blob),
        "site": site,
        "candidates": [_candidate(context, source) for source in ranked],
        "excluded": asked.excluded((*ranking.excluded, *ranking.elsewhere)),
    }
    if choice is not None:
        answer["conversion"] = asked.conversion(named["format"], asked.considered(choice))
    return answer | {name: named[name] for name in ("image", "format") if name in named}


def _option(context: Context, named: Mapping[str, Any], ranking: rank.Ranking) -> formats.Option:
    """What counts of a format's ranking against those of others."""
    loads = context.memory.read_loads
    seconds = min((source.estimate.score for source in ranking.sources), default=None)
    places = [candidate for candidate, _, _ in ranking.sources]
    full = all(place.slots is not None and loads.get(place.store, IDLE).active >= place.slots for place in places)
    return formats.Option(named.get("format", ""), named["view"].blob.size or 0, seconds, full)


def _ranked(
    context: Context, client: Client, request: Mapping[str, Any], view: BlobView, failed_until: Mapping[str, float]
) -> tuple[rank.Ranking, str | None]:
    """The blob's replicas ranked for this client, and the site that this is for. Raises `Invalid`."""
    stores = context.memory.stores()
    candidates = [
        accept.source(replica, stores[replica.store], stores[replica.store].endpoint.partition(":")[0])
        for replica in view.replicas
        if replica.store in stores
    ]
    wishes = asked.wishes(context, client, request, (candidate.store for candidate in candidates))
    principal = client.principal
    as_if = request["site"] if "site" in request and principal.role is Role.ADMIN else None
    site = as_if or wishes.site
    ask = accept.Request(
        Operation.DOWNLOAD, site, view.blob.size, principal.project, principal.sees_private_stores, wishes.prefer, wishes.avoid,
        wishes.schemes, failed_until=failed_until, proven_site=as_if or client.site,
    )  # fmt: skip
    now, policy = context.clock(), context.policy.rank
    outlooks = context.memory.outlooks(Direction.READ, site, policy, now)
    return rank.rank(ask, candidates, outlooks, context.memory.read_loads, policy, now, context.rng), site


async def _named(context: Context, client: Client, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each blob that may be meant: its ``view``, and ``image`` and ``format`` where it was named by them."""
    if "blob" in request:
        with reachable():
            (view,) = await views.blobs(context.db, [UUID(request["blob"])])
        if view is None or not may_read_blob(client.principal, view.images):
            raise errors.NotFound("No such blob.")
        return [{"view": view}]
    with reachable():
        (found,) = await images.get_many(context.db, [request["image"]])
    image = locate.readable_image(client, found)
    several = "convert" in request
    wanted = locate.acceptable_formats(image, request) if several else [locate.choose_format(image, request.get("formats"))]
    with reachable():
        seen = await views.blobs(context.db, [image.blobs[format] for format in wanted])
    if not all(seen):
        raise errors.NotFound("No such blob.")
    return [{"view": view, "image": str(image.id), "format": format} for format, view in zip(wanted, seen, strict=True)]


def _candidate(context: Context, source: rank.Source) -> dict[str, Any]:
    candidate, estimate, weight = source
    return {
        **places.describe(candidate, estimate, weight),
        "score": estimate.score,
        "evidence": estimate.evidence,
        "doubt": context.memory.doubts(Direction.READ).get(candidate.store, 0.0),
        "active": context.memory.read_loads.get(candidate.store, IDLE).active,
        "slots": candidate.slots,
        "bandwidth": candidate.bandwidth,
        "cost": candidate.cost,
    }


def why(context: Context, client: Client, record: TicketRecord) -> dict[str, Any]:
    """What was recorded of a choice: its places with their numbers as they were, and what was excluded; of stores that exist for him."""
    shown = []
    for place in places.recorded(record.places):
        store = context.memory.store_by_id(place.store_id)
        if store is not None and may_see_store(client.principal, store):
            at = place.place_at(store)
            shown.append({**places.describe(at, at, place.weight), "concurrency": place.concurrency})
    told = [] if record.why is None else record.why.get("excluded", [])
    known = {entry["store"]: context.memory.store(entry["store"]) for entry in told}
    excluded = [entry for entry in told if (store := known[entry["store"]]) is not None and may_see_store(client.principal, store)]
    told_formats = {} if record.why is None or "formats" not in record.why else {"formats": record.why["formats"]}
    return {"candidates": shown, "excluded": excluded, **told_formats}
