"""Where can I get this? The way of a download ticket, for one request or for many at once.

Read downwards: `download_many` locates, decides, admits, then answers. A batch takes the same trip as a single request:
one look-up for what memory does not have, one statement for the leases and records of all. Each request ends as its own
ticket or its own error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import orjson

from broker import accept, admit, errors, rank
from broker.catalog import leases
from broker.model import Client, Direction, Image, Operation
from broker.paths import IDLE
from broker.permit import ImageAccess, may_read_blob, may_read_image, may_see_image
from broker.service import asked, places
from broker.service.context import Context
from broker.service.memory import HotBlob


@dataclass(slots=True)
class Plan:
    """One request on its way to a ticket."""

    id: UUID
    count: int
    parallel: int
    hot: HotBlob
    image_id: UUID | None
    format: str | None
    ranking: rank.Ranking
    offers: list[admit.Offer]
    granted: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    leases: dict[str, float] = field(default_factory=dict)
    expires_at: float | None = None
    wants: tuple[str, ...] = ()


async def download(context: Context, client: Client, request: Mapping[str, Any], id: UUID) -> dict[str, Any]:
    """One ticket, with the id `id`. Raises `NotFound`, `Forbidden`, `Invalid`, `NoSource`, `Busy`, `Unavailable`."""
    result = (await download_many(context, client, [(id, request)]))[0]
    if isinstance(result, errors.BrokerError):
        raise result
    return result


async def download_many(
    context: Context, client: Client, requests: Sequence[tuple[UUID, Mapping[str, Any]]]
) -> list[dict[str, Any] | errors.BrokerError]:
    """A ticket or an error for each request, in order. Raises only `Unavailable`, and then nothing was granted to anyone."""
    now = context.clock()
    targets = await _locate(context, client, [request for _, request in requests])
    results: list[Any] = []
    plans: list[Plan] = []
    for (id, request), target in zip(requests, targets, strict=True):
        try:
            if isinstance(target, errors.BrokerError):
                raise target
            plan = _decide(context, client, request, id, target, now)
            plans.append(plan)
            results.append(plan)
        except errors.BrokerError as error:
            results.append(error)
    if plans:
        await _admit(context, client, plans, now)
    return [_answer(context, client, plan, now) if isinstance(plan, Plan) else plan for plan in results]


# -- locate


@dataclass(frozen=True, slots=True)
class _Target:
    hot: HotBlob
    image_id: UUID | None = None
    format: str | None = None


async def _locate(context: Context, client: Client, requests: Sequence[Mapping[str, Any]]) -> list[_Target | errors.BrokerError]:
    """Which blob each request means, if this principal may read it."""
    chosen = await _choose_blobs(context, client, requests)
    hot: dict[UUID, HotBlob | None] = {}
    cold: list[UUID] = []
    for choice in chosen:
        if not isinstance(choice, errors.BrokerError) and (known := context.memory.known_blob(choice[0])) is None:
            cold.append(choice[0])
        elif not isinstance(choice, errors.BrokerError):
            hot[choice[0]] = known
    if cold:
        hot |= dict(zip(cold, await context.memory.hot_blobs(cold), strict=True))
    found: list[_Target | errors.BrokerError] = []
    for choice in chosen:
        if isinstance(choice, errors.BrokerError):
            found.append(choice)
            continue
        blob_id, image_id, format = choice
        blob = hot[blob_id]
        if blob is None or (image_id is None and not may_read_blob(client.principal, blob.view.images)):
            found.append(errors.NotFound("No such blob."))
        else:
            found.append(_Target(blob, image_id, format))
    return found


async def _choose_blobs(
    context: Context, client: Client, requests: Sequence[Mapping[str, Any]]
) -> list[tuple[UUID, UUID | None, str | None] | errors.BrokerError]:
    """Blob id, image id and format of each request."""
    image_ids = [UUID(request["image"]) for request in requests if "image" in request]
    images = dict(zip(image_ids, await context.memory.images(image_ids), strict=True)) if image_ids else {}
    chosen: list[Any] = []
    for request in requests:
        if "blob" in request:
            chosen.append((UUID(request["blob"]), None, None))
            continue
        try:
            image = _readable(client, images[UUID(request["image"])])
            format = _choose_format(image, request.get("formats"))
            chosen.append((image.blobs[format], image.id, format))
        except errors.BrokerError as error:
            chosen.append(error)
    return chosen


def _readable(client: Client, image: Image | None) -> Image:
    if image is None or not may_see_image(client.principal, image.project, image.visibility):
        raise errors.NotFound("No such image.")
    if not may_read_image(client.principal, ImageAccess(image.id, image.project, image.visibility, image.status, "")):
        raise errors.Forbidden("The image is deactivated.")
    return image


def _choose_format(image: Image, formats: Sequence[str] | None) -> str:
    """The first format that the client asked for and the image has; the first of all when it did not ask."""
    for format in formats or sorted(image.blobs):
        if format in image.blobs:
            return format
    if not image.blobs:
        raise errors.NoSource("The image has no bytes yet; upload them first.")
    have = ", ".join(sorted(image.blobs))
    raise errors.NoSource(f"The image has none of the formats asked for; it has {have}.", field="formats", expected=have)


# -- decide


def _decide(context: Context, client: Client, request: Mapping[str, Any], id: UUID, target: _Target, now: float) -> Plan:
    """Rank the blob's replicas for this client. Raises `NoSource` when there is none to offer."""
    site = asked.site_of(context, client, request)
    candidates = target.hot.candidates
    ask = accept.Request(
        operation=Operation.DOWNLOAD,
        site=site,
        size=target.hot.view.blob.size,
        project=client.principal.project,
        sees_private=client.principal.sees_private_stores,
        prefer=asked.store_names(context, client, request, "prefer"),
        avoid=asked.avoided(context, client, request, (candidate.store for candidate in candidates)),
        schemes=frozenset(request["schemes"]) if "schemes" in request else _ANY,
        failed_until=context.memory.failures(client.name),
    )
    averages = context.memory.averages(Direction.READ)
    ranking = rank.rank(ask, candidates, averages, context.memory.read_loads, context.policy.rank, now, context.rng)
    _count_exclusions(context, ranking)
    if not ranking.sources:
        context.metrics.ticket("download", "no-source")
        raise errors.NoSource(
            "Every replica is excluded." if ranking.excluded else "The blob has no replica.",
            extra={"excluded": asked.excluded(ranking)},
            retry_after=context.policy.rank.failure_seconds if _may_pass(ranking) else None,
        )
    offers = [admit.Offer(c.store, c.slots, estimate.seconds) for c, estimate, _ in ranking.sources]
    count, parallel = request.get("count", 3), request.get("parallel", 1)
    return Plan(id, max(count, parallel), parallel, target.hot, target.image_id, target.format, ranking, offers)


def _count_exclusions(context: Context, ranking: rank.Ranking) -> None:
    for exclusion in ranking.excluded:
        context.metrics.exclusion(exclusion.reason)
    for exclusion in ranking.hidden:
        context.metrics.exclusion(exclusion.reason)


def _may_pass(ranking: rank.Ranking) -> bool:
    """Whether waiting can help: something is excluded only because it failed this client a moment ago."""
    return any(exclusion.reason is accept.Reason.RECENTLY_FAILED for exclusion in ranking.excluded)


# -- admit


async def _admit(context: Context, client: Client, plans: Iterable[Plan], now: float) -> None:
    """Lease the best places of every plan and record the tickets, in as few round trips as there are stores to pass over."""
    pending = list(plans)
    swept = False
    while pending:
        asked = [plan for plan in pending if _wants(context, plan)]
        if asked:
            grants = await context.grants([_grant_request(context, client, plan) for plan in asked])
            for plan, (grant, _) in zip(asked, grants, strict=True):
                _take(context, plan, grant)
            context.memory.note_leases(grants[0][1])
        pending = [plan for plan in asked if plan.wants]
        if not pending and not swept:
            # Expired leases still count until they are swept: do that before anyone is sent away.
            swept = True
            full = [plan for plan in plans if plan.expires_at is None]
            if full and await leases.sweep(context.db):
                for plan in full:
                    plan.refused.clear()
                pending = full
    full_stores = {offer.store for plan in plans if plan.expires_at is None for offer in plan.offers}
    if full_stores:
        await _note_ends(context, full_stores)


async def _note_ends(context: Context, names: Iterable[str]) -> None:
    """Learn when leases on full stores end, for Retry-After."""
    ids = {store.id: name for name in names if (store := context.memory.store(name)) is not None}
    for store_id, ends in (await leases.ends(context.db, list(ids), Direction.READ)).items():
        load = context.memory.read_loads.get(ids[store_id], IDLE)
        context.memory.read_loads[ids[store_id]] = replace(load, active=max(load.active, len(ends)), ends=ends)


def _wants(context: Context, plan: Plan) -> bool:
    """Choose what to ask for in this round; False when the plan is done, or nothing is left to ask for."""
    plan.wants = admit.next_wants(plan.offers, context.memory.read_loads, plan.parallel, plan.granted, plan.refused)
    return bool(plan.wants)


def _grant_request(context: Context, client: Client, plan: Plan) -> leases.GrantRequest:
    """Stores without slots are granted here and now; the others are asked for."""
    wanted: list[leases.Want] = []
    for store, slots, seconds in plan.offers:
        if store not in plan.wants or store in plan.granted:
            continue
        if slots is None:
            plan.granted.add(store)
        else:
            record = context.memory.store(store)
            if record is not None and all(want.store_id != record.id for want in wanted):
                wanted.append(leases.Want(record.id, "read", admit.lease_seconds(seconds, context.policy.admit)))
    if plan.expires_at is not None:  # recorded in an earlier round: only more leases are asked for
        return leases.GrantRequest(plan.id, None, wanted, False)
    principal = client.principal
    ticket = leases.TicketRow(
        Operation.DOWNLOAD, principal.project, principal.subject, client.instance, client.address, client.site, plan.image_id,
        plan.hot.view.blob.id, plan.hot.view.blob.size, orjson.dumps(_record(context, plan)).decode(),
        admit.ticket_seconds(plan.offers, context.policy.admit),
    )  # fmt: skip
    return leases.GrantRequest(plan.id, ticket, wanted, not plan.granted)


def _record(context: Context, plan: Plan) -> list[Any]:
    """The places that the ticket may name: the best ones, and those asked for now."""
    recorded = []
    for index, (candidate, estimate, weight) in enumerate(plan.ranking.sources):
        if index < plan.count or candidate.store in plan.wants:
            store = context.memory.store(candidate.store)
            if store is not None:
                recorded.append(
                    places.to_record(
                        store.id, candidate, estimate, weight, candidate.store in plan.wants, _concurrency(context, candidate.store)
                    )
                )
    return recorded


def _concurrency(context: Context, store: str) -> int:
    """Transfers on the store with this one."""
    return context.memory.read_loads.get(store, IDLE).active + 1


def _take(context: Context, plan: Plan, grant: leases.Grant) -> None:
    """Take over what the database said."""
    if grant.created:
        plan.expires_at = grant.expires_at
    for store_id, ends_at in grant.leases.items():
        store = context.memory.store_by_id(store_id)
        if store is not None:
            plan.granted.add(store.name)
            plan.leases[store.name] = ends_at
    plan.refused.update(name for name in plan.wants if name not in plan.granted)


# -- answer


def _answer(context: Context, client: Client, plan: Plan, now: float) -> dict[str, Any] | errors.BrokerError:
    """The ticket as the client gets it; only what is returned is signed."""
    admitted = admit.settle(plan.offers, plan.granted, context.memory.read_loads, plan.count, now, context.policy.admit)
    if isinstance(admitted, admit.Full) or plan.expires_at is None:
        context.metrics.ticket("download", "busy")
        wait = admitted.retry_after if isinstance(admitted, admit.Full) else context.policy.admit.retry_seconds
        return errors.Busy(
            "Every store that has the blob is at its limit.", retry_after=wait, extra={"excluded": asked.excluded(plan.ranking)}
        )
    sources: list[dict[str, Any]] = []
    for state, indexes in (("active", admitted.active), ("standby", admitted.standby)):
        for index in indexes:
            candidate, estimate, weight = plan.ranking.sources[index]
            place = places.Place.of(candidate, estimate, weight, state)
            signed = places.sign_read(context, place, plan.expires_at, now)
            if signed is None:
                plan.ranking.excluded.append(rank.Exclusion(candidate, accept.Reason.UNSIGNABLE))
                continue
            sources.append(places.render(place, len(sources) + 1, signed))
    if not sources:
        return errors.NoSource("No URL can be signed for any replica.", extra={"excluded": asked.excluded(plan.ranking)})
    context.metrics.ticket("download", "granted", sources[0]["store"])
    return asked.render_download(
        plan.id, "open", plan.hot.view.blob, plan.image_id, plan.format, plan.expires_at, sources, asked.excluded(plan.ranking)
    )


_ANY: frozenset[str] = frozenset()
