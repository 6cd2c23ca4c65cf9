"""Where can I get this? The way of a download ticket, for one request or for many at once.

Read downwards: `download_many` locates, decides, admits, then answers. A batch takes the same trip as a single request:
one look-up for what memory does not have, one statement for the leases and records of all. Each request ends as its own
ticket or its own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker import accept, admit, errors, formats, rank
from broker.catalog import leases, tickets
from broker.catalog.leases import Party
from broker.model import Client, Direction, Operation
from broker.paths import IDLE
from broker.service import asked, places, promises, ways
from broker.service.context import Context
from broker.service.locate import Target, blobs_of
from broker.service.parties import party_of
from broker.service.ways import Source

_STRETCH = 31
"""After so many requests of a batch, and one, whoever waits for the processor has a turn: batches make nobody wait for them."""


@dataclass(slots=True)
class Plan:
    """One request on its way to a ticket."""

    id: str
    count: int
    parallel: int
    target: Target
    sources: list[Source]
    excluded: list[dict[str, str]]
    ttl_seconds: float
    wanted: list[Source]
    """Those of the sources on which a lease is worth its while."""
    due: frozenset[int] = frozenset()
    """The stores to ask, where it is known whose turn it is; else any."""
    shares: frozenset[str] = frozenset()
    """Stores where other plans of the same client hold leases that are good for this one."""
    wants: tuple[str, ...] = ()
    over_limit: bool = False
    retry_after: float | None = None
    returned: bool = False
    filename: str | None = None
    """What the stores are to call the file."""
    keeps_filename: bool = False
    """Whether a refresh is to call it that again."""
    granted: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    expires_at: float | None = None
    choice: formats.Choice | None = None
    """Why this format, where the client could convert others."""
    stale: bool = False
    """Decided without the catalogue (`broker.service.stale`)."""


async def download(
    context: Context, client: Client, request: Mapping[str, Any], id: str, due: frozenset[int] = frozenset(), *, patient: bool = False
) -> dict[str, Any]:
    """One ticket, with the id `id`; `due` are the stores to lease from, where it is known. Who is `patient` can wait for a good one.

    `request` is one of POST /v1/tickets; what renders tickets that nobody comes back with adds ``once``.

    Raises `NotFound`, `Forbidden`, `Invalid`, `NoSource`, `Busy`, `QuotaExceeded`, `Unavailable`.
    """
    result = (await download_many(context, client, [(id, request)], due, patient=patient))[0]
    if isinstance(result, errors.BrokerError):
        raise result
    return result


async def download_many(
    context: Context,
    client: Client,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    due: frozenset[int] = frozenset(),
    *,
    patient: bool = False,
    at_once: int | None = None,
) -> list[dict[str, Any] | errors.BrokerError]:
    """A ticket or an error for each request, in order. Raises only `Unavailable`, and then nothing was granted to anyone.

    `at_once`: the client moves no more of them at the same time, so that it needs no more leases on a store (`_share_leases`).
    """
    now = context.clock()
    name = client.name
    asker = _asker(context, client, await context.memory.failures_of(name), now)
    results: list[Any] = await blobs_of(context.memory.hot, client, [request for _, request in requests])
    plans: list[Plan] = []
    for index, (id, request) in enumerate(requests):
        if index & _STRETCH == _STRETCH:
            await asyncio.sleep(0)
        target = results[index]
        if not isinstance(target, errors.BrokerError):
            try:
                plan = results[index] = _decide(context, asker, request, id, target, now)
                plan.due = due
                if patient:
                    plan.wanted = admit.worth_a_slot(plan.sources, context.policy.admit)
                plans.append(plan)
            except errors.BrokerError as error:
                results[index] = error
    unreached: errors.Unavailable | None = None
    if plans:
        try:
            if at_once is None or party_of(context, client.principal).is_limited:
                await _admit(context, client, plans)
            else:
                await _share_leases(context, client, plans, at_once)
            await _tell_why(context, plans)
        except errors.Unavailable as error:
            if all(plan.expires_at is None for plan in plans):
                raise
            unreached = error  # what was granted stands, and is answered
    for index, result in enumerate(results):
        if index & _STRETCH == _STRETCH:
            await asyncio.sleep(0)
        if isinstance(result, Plan):
            is_lost = unreached is not None and result.expires_at is None
            results[index] = unreached if is_lost else _answer(context, name, result, now)
    return results


async def from_memory(context: Context, client: Client, request: Mapping[str, Any], id: str) -> dict[str, Any]:
    """A ticket without the catalogue: of what is in memory, from stores without slots, not recorded (`broker.service.stale`).

    Raises as `download` does, `Unavailable` where memory does not have it, every store counts its slots, or the project has a quota.
    """
    now, memory = context.clock(), context.memory
    (target,) = await blobs_of(memory.hot.known(), client, [request])
    if isinstance(target, errors.BrokerError):
        raise target
    plan = _decide(context, _asker(context, client, memory.failures(client.name), now), request, id, target, now)
    plan.sources = [source for source in plan.sources if source.slots is None]
    if not plan.sources or party_of(context, client.principal).is_limited:
        raise errors.Unavailable("The catalogue cannot be reached, and transfers are counted there.", retry_after=1.0)
    plan.stale, plan.expires_at = True, now + plan.ttl_seconds
    plan.granted = frozenset(source.store for source in plan.sources[: plan.parallel])
    result = _answer(context, client.name, plan, now)
    if isinstance(result, errors.BrokerError):
        raise result
    context.unrecorded.note(UUID(id))
    return result


# -- decide


class Asker(NamedTuple):
    """A client, and what follows for each of its requests that has no wishes of its own."""

    client: Client
    plain: accept.Request
    outlooks: rank.Outlooks


def _asker(context: Context, client: Client, failed_until: Mapping[str, float], now: float) -> Asker:
    principal = client.principal
    plain = accept.Request(
        Operation.DOWNLOAD, client.site, None, principal.project, principal.sees_private_stores,
        failed_until=failed_until, proven_site=client.site,
    )  # fmt: skip
    return Asker(client, plain, context.memory.outlooks(Direction.READ, client.site, context.policy.rank, now))


def _decide(context: Context, asker: Asker, request: Mapping[str, Any], id: str, target: Target | list[Target], now: float) -> Plan:
    """Rank the blob's replicas for this client, or those of the format that it can use soonest. Raises `NoSource` when there is none."""
    if isinstance(target, list):
        return _decide_format(context, asker, request, id, target, now)
    plan = _plan(context, asker, request, id, target, now)
    if not plan.sources:
        raise _no_source(context, plan.excluded)
    return plan


def _decide_format(context: Context, asker: Asker, request: Mapping[str, Any], id: str, targets: Sequence[Target], now: float) -> Plan:
    plans = [_plan(context, asker, request, id, target, now) for target in targets]
    options = [_option(plan, context.memory.read_loads) for plan in plans]
    choice = formats.choose(options, request["formats"], request["convert"])
    if choice is None:
        raise _no_source(context, plans[0].excluded if plans else [])
    plan = plans[choice.chosen]
    plan.choice = choice
    return plan


def _option(plan: Plan, loads: rank.Loads) -> formats.Option:
    """What is weighed of a plan against those of other formats."""
    seconds = min((source.seconds / source.way.prospect.success * source.way.prospect.dearness for source in plan.sources), default=None)
    full = all(source.slots is not None and loads.get(source.store, IDLE).active >= source.slots for source in plan.sources)
    return formats.Option(plan.target.format or "", plan.target.blob.size or 0, seconds, full)


def _no_source(context: Context, excluded: list[dict[str, str]]) -> errors.NoSource:
    context.metrics.ticket("download", "no-source")
    return errors.NoSource(
        "Every replica is excluded." if excluded else "The blob has no replica.",
        extra={"excluded": excluded},
        retry_after=context.policy.rank.failure_seconds if _may_pass(excluded) else None,
    )


def _plan(context: Context, asker: Asker, request: Mapping[str, Any], id: str, target: Target, now: float) -> Plan:
    """The blob's replicas ranked for this client; perhaps there is none to offer."""
    client, ask, outlooks = asker
    blob = target.blob
    if asked.has_wishes(request):
        wishes = asked.wishes(context, client, request, (candidate.store for candidate in ways.candidates(context, blob)))
        ask = ask._replace(site=wishes.site, prefer=wishes.prefer, avoid=wishes.avoid, schemes=wishes.schemes)
        outlooks = context.memory.outlooks(Direction.READ, wishes.site, context.policy.rank, now)
    excluded: list[dict[str, str]] = []
    sources = None if ask.is_choosy or ask.prefer else ways.plain_sources(context, blob, ask, outlooks)
    if sources is None:
        ask = ask._replace(size=blob.size)
        candidates, loads = ways.candidates(context, blob), context.memory.read_loads
        ranking = rank.rank(ask, candidates, outlooks, loads, context.policy.rank, now, context.rng)
        _count_exclusions(context, ranking)
        sources, excluded = ways.ranked_sources(context, ranking, outlooks), asked.excluded(ranking.excluded)
        if not sources:
            excluded += asked.excluded(ranking.elsewhere)
    count, parallel = request.get("count", 3), request.get("parallel", 1)
    ttl_seconds = admit.ticket_seconds(sources, context.policy.admit) if sources else 0.0
    plan = Plan(id, max(count, parallel), parallel, target, sources, excluded, ttl_seconds, sources)
    if "filename" in request:
        plan.filename, plan.keeps_filename = request["filename"], not request.get("once")
    return plan


def _count_exclusions(context: Context, ranking: rank.Ranking) -> None:
    for exclusion in (*ranking.excluded, *ranking.hidden, *ranking.elsewhere):
        context.metrics.exclusion(exclusion.reason)


def _may_pass(excluded: Iterable[Mapping[str, str]]) -> bool:
    """Whether waiting can help: something is excluded only because it failed this client a moment ago."""
    return any(exclusion["reason"] == accept.Reason.RECENTLY_FAILED for exclusion in excluded)


# -- admit


async def _admit(context: Context, client: Client, plans: Sequence[Plan]) -> None:
    """Lease the best places of every plan and record the tickets, in as few round trips as there are stores to pass over."""
    party = party_of(context, client.principal)
    pending = plans
    swept = False
    while pending:
        asked = [plan for plan in pending if _wants(context, plan)]
        if asked:
            grants = await context.grants([_grant_request(context, client, party, plan) for plan in asked])
            for plan, (grant, _) in zip(asked, grants, strict=True):
                _take(context, plan, grant)
            context.memory.note_leases(grants[0][1])
        pending = [plan for plan in asked if len(plan.granted) < plan.parallel]
        if not pending and not swept:
            # Expired leases still count until they are swept: do that before anyone is sent away.
            swept = True
            full = [plan for plan in plans if plan.expires_at is None]
            if full and await leases.sweep(context.db):
                for plan in full:
                    plan.refused, plan.over_limit = frozenset(), False
                pending = full
    for index, plan in enumerate(plans):
        if index & _STRETCH == _STRETCH:
            await asyncio.sleep(0)
        if plan.expires_at is None:
            await _foresee(context, client, party, plan)


async def _share_leases(context: Context, client: Client, plans: Sequence[Plan], at_once: int) -> None:
    """Admit plans of which the client carries out `at_once` at a time, in their order: on each store the last ones get leases, which
    they hold until the rest is done, and what goes to a store where one was granted needs none."""
    by_store: dict[str, list[Plan]] = {}
    for plan in plans:
        by_store.setdefault(plan.wanted[0].store, []).append(plan)
    leaders = [plan for group in by_store.values() for plan in group[-at_once:]]
    await _admit(context, client, leaders)
    opened = frozenset(store for plan in leaders for store in plan.granted)
    followers = [plan for plan in plans if plan.expires_at is None]
    for plan in followers:
        plan.refused, plan.over_limit, plan.retry_after = frozenset(), False, None
        plan.shares = opened
        plan.wanted = [source for source in plan.wanted if source.store in opened] or plan.wanted
    await _admit(context, client, followers)


async def _foresee(context: Context, client: Client, party: Party, plan: Plan) -> None:
    """When a request that got no lease may come again."""
    if plan.over_limit:
        plan.retry_after = await promises.until_within_limit(context, party, _lease_bytes(plan))
    else:
        plan.returned = context.promises.has_returned(_who(client.name, plan), context.clock())
        plan.retry_after = await promises.until_turn(context, _who(client.name, plan), party, _full_stores(plan), Direction.READ)


def _full_stores(plan: Plan) -> dict[int, float]:
    """The stores that refused, with the seconds that the transfer would take from each."""
    return {source.way.store_id: source.seconds for source in plan.wanted}


def _lease_bytes(plan: Plan) -> int:
    """What one lease of the ticket moves: its sources share the blob, as far as there are several."""
    return -(-(plan.target.blob.size or 0) // max(1, min(plan.parallel, len(plan.wanted))))


def _who(client: str, plan: Plan) -> str:
    """Names whoever asks for this blob, to know it again when it comes back."""
    return f"{client} {plan.target.blob.id}"


async def _tell_why(context: Context, plans: Sequence[Plan]) -> None:
    """Record with the tickets what was excluded, why this format, and the file names to go on with; nearly always there is nothing."""
    whys = {
        UUID(plan.id): _why(plan)
        for plan in plans
        if (plan.excluded or plan.keeps_filename or plan.choice is not None) and plan.expires_at is not None
    }
    if whys:
        await tickets.tell_why(context.db, whys)


def _why(plan: Plan) -> dict[str, Any]:
    told: dict[str, Any] = {"excluded": plan.excluded}
    if plan.keeps_filename:
        told["filename"] = plan.filename
    if plan.choice is not None:
        told["formats"] = asked.considered(plan.choice)
    return told


def _wants(context: Context, plan: Plan) -> bool:
    """Choose what to ask for in this round; False when the plan is done, or nothing is left to ask for."""
    sources, loads = plan.wanted, context.memory.read_loads
    if plan.due:
        sources, loads = [source for source in sources if source.way.store_id in plan.due], {}
    plan.wants = admit.next_wants(sources, loads, plan.parallel, plan.granted, plan.refused)
    return bool(plan.wants)


def _grant_request(context: Context, client: Client, party: Party, plan: Plan) -> leases.GrantRequest:
    """Stores without slots are granted here and now, unless the project's leases are counted; the others are asked for."""
    loads, wants = context.memory.read_loads, plan.wants
    wanted: list[leases.Want] = []
    asked_for = [next(source for source in plan.sources if source.store == store) for store in wants]
    for source in asked_for:
        if (source.slots is None and not party.is_limited) or source.store in plan.shares:
            plan.granted |= {source.store}
        else:
            seconds = admit.lease_seconds(source.seconds, context.policy.admit)
            wanted.append(leases.Want(source.way.store_id, "read", seconds, min(source.seconds, seconds), _lease_bytes(plan)))
    if plan.expires_at is not None:  # recorded in an earlier round: only more leases are asked for
        return leases.GrantRequest(plan.id, None, wanted, False, party)
    recorded = [
        source.record(wanted_now, loads.get(source.store, IDLE).active + 1)
        for index, source in enumerate(plan.sources)
        if (wanted_now := source.store in wants) or index < plan.count
    ]
    principal, blob = client.principal, plan.target.blob
    ticket = leases.TicketRow(
        Operation.DOWNLOAD, principal.project, principal.subject, client.instance, client.address, client.site, plan.target.image_id,
        blob.id, blob.size, orjson.Fragment(f"[{','.join(recorded)}]"), plan.ttl_seconds,
    )  # fmt: skip
    return leases.GrantRequest(plan.id, ticket, wanted, not plan.granted, party)


def _take(context: Context, plan: Plan, grant: leases.Grant) -> None:
    """Take over what the database said."""
    if grant.expires_at is not None:
        plan.expires_at = grant.expires_at
    for store_id in grant.leases:
        store = context.memory.store_by_id(store_id)
        if store is not None:
            plan.granted |= {store.name}
    for name in plan.wants:
        if name not in plan.granted:
            plan.refused |= {name}
            plan.over_limit = plan.over_limit or grant.over_limit
            if not grant.over_limit:
                context.metrics.leases_refused.inc(name, "read")


# -- answer


def _answer(context: Context, client: str, plan: Plan, now: float) -> dict[str, Any] | errors.BrokerError:
    """The ticket as the client gets it; only what is returned is signed."""
    target, metrics = plan.target, context.metrics
    admitted = admit.settle(plan.sources, plan.granted, plan.count)
    if admitted is None or plan.expires_at is None:
        return _refusal(context, client, plan)
    if context.promises:
        context.promises.kept(context, _who(client, plan))
    first = None
    shown: list[str] = []
    until = places.until(context, plan.expires_at, now)
    for state, indexes in (("active", admitted.active), ("standby", admitted.standby)):
        for index in indexes:
            source = plan.sources[index]
            read = places.sign_read(context, source.store, source.key, until, plan.filename)
            if read is None:
                plan.excluded.append({"store": source.store, "reason": accept.Reason.UNSIGNABLE})
                metrics.exclusion(accept.Reason.UNSIGNABLE)
                continue
            first = first or source.store
            shown.append(source.show(len(shown) + 1, state, read))
    if first is None:
        metrics.ticket("download", "no-source")
        return errors.NoSource("No URL can be signed for any replica.", extra={"excluded": plan.excluded})
    metrics.ticket("download", "stale" if plan.stale else "granted", first)
    if not plan.stale:
        seconds = next(source.seconds for source in plan.sources if source.store == first)
        over_at = min(plan.expires_at, now + admit.lease_seconds(seconds, context.policy.admit))
        context.repeats.note(client, target.blob.id, plan.id, first, now, over_at)
    sources = orjson.Fragment(f"[{','.join(shown)}]")
    blob, image, format = target
    shown_ticket = asked.render_download(plan.id, "open", blob.summary, image, format, plan.expires_at, sources, plan.excluded)
    if plan.choice is not None:
        shown_ticket["conversion"] = asked.conversion(format, asked.considered(plan.choice))
    if plan.stale:
        shown_ticket["stale"] = True
    return shown_ticket


def _refusal(context: Context, client: str, plan: Plan) -> errors.BrokerError:
    """Nothing was granted: why, when to come again, and what can be waited for."""
    extra = {"excluded": plan.excluded}
    refusal: errors.Busy | errors.QuotaExceeded
    if plan.over_limit:
        context.metrics.ticket("download", "quota-exceeded")
        context.metrics.quota_refusals.inc("download")
        refusal = errors.QuotaExceeded(
            "The project may not hold more leases, or leases on so many bytes.", retry_after=plan.retry_after, extra=extra
        )
    else:
        context.metrics.ticket("download", "busy")
        refusal = errors.Busy("Every store that has the blob is at its limit.", retry_after=plan.retry_after, extra=extra)
        refusal.who, refusal.returned = _who(client, plan), plan.returned
    refusal.stores, refusal.bytes = _full_stores(plan), _lease_bytes(plan)
    return refusal
