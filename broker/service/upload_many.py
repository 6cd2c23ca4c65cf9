"""Many uploads at once, for a client that writes each in one PUT and declares everything at once: one trip for all of them.

Read downwards: `upload_many` ranks, admits, signs, writes, answers. What a single upload does in some fifteen round trips, all of them
do in a handful; what it becomes is the same, and is committed, refreshed and reaped as any other (`broker.service.upload`).

Rules
- The client moves at most `at_once` of them at the same time. So a store with slots is asked for no more leases than that, for those
  that come last in the batch, which hold theirs until the rest is done; with one lease all that go to the store are let in.
- All are let in, or none: who gets half of a batch could not ask again for the other half alone.
- Stores in `avoid` come last: there is a better chance elsewhere, but none is refused for it.
- Nothing is written before the leases are there; what cannot be written then gives its lease back.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from broker import admit, errors
from broker.catalog import beginnings, leases
from broker.catalog import tickets as records
from broker.catalog.beginnings import Beginning
from broker.catalog.leases import Party
from broker.catalog.transaction import transaction
from broker.catalog.uploads import NewDestination
from broker.model import Client, Direction, Handle, Image, Operation, Store, new_ids
from broker.service import destinations, parts, places, promises, upload
from broker.service.context import Context
from broker.service.parties import party_of
from broker.service.targets import Target
from broker.sign.record import Record, RecordedImage
from broker.stores.base import Write

STRETCH = 16


class Wanted(NamedTuple):
    """What is to be uploaded, and the image that it is; `makes_image` says whether that and its blob are made with it."""

    target: Target
    image: Image
    makes_image: bool
    avoid: Collection[int] = ()
    """Stores that come last, by id."""


class Begun(NamedTuple):
    """An upload under way, and what writes its bytes."""

    id: UUID
    handle: Handle


Take = Callable[[Any, Sequence[Wanted]], Awaitable[Sequence[bool]]]
"""Called in the transaction that writes, before anything else is: which of them may be."""


@dataclass(slots=True)
class _Ask:
    """One upload on its way."""

    id: UUID
    wanted: Wanted
    places: list[NewDestination]
    excluded: list[dict[str, str]]
    result: Begun | errors.BrokerError | None = None
    tried: dict[int, float] = field(default_factory=dict)
    """Stores that gave no lease, with the seconds that the transfer would take there."""
    granted: bool = False
    urls_until: float = 0.0
    bound: Sequence[str] = ()

    @property
    def place(self) -> NewDestination:
        return self.places[0]

    @property
    def size(self) -> int:
        return self.wanted.target.size or 0


async def upload_many(
    context: Context, client: Client, wanted: Sequence[Wanted], *, at_once: int, take: Take
) -> list[Begun | errors.BrokerError]:
    """Each upload, or why there is none, in order. Raises `Busy`, `QuotaExceeded` (nothing was begun), `Forbidden`, `Unavailable`."""
    if not client.principal.may_write:
        raise errors.Forbidden("The role reader may not upload.")
    ids = new_ids(len(wanted), context.clock())
    asks: list[_Ask] = []
    failed_until = await context.memory.failures_of(client.name)
    for id, each in zip(ids, wanted, strict=True):
        asks.append(await _rank(context, client, UUID(id), each, failed_until))
        if len(asks) % STRETCH == 0:  # whoever waits for the processor has a turn
            await asyncio.sleep(0)
    await _admit(context, client, [ask for ask in asks if ask.result is None], at_once)
    signed = [ask for ask in asks if ask.result is None and await _sign(context, client, ask)]
    begun = await _write(context, client, signed, take) if signed else []
    lost = [(ask.id, None) for ask in asks if ask.granted and ask not in begun]
    if lost:
        await leases.release(context.db, lost)
    why = {ask.id: {"excluded": ask.excluded} for ask in begun if ask.excluded}
    if why:
        await records.tell_why(context.db, why)
    for ask in begun:
        context.metrics.ticket("upload", "granted", _store(context, ask.place).name)
    return [ask.result or errors.Unavailable() for ask in asks]


# -- where to


async def _rank(context: Context, client: Client, id: UUID, wanted: Wanted, failed_until: Mapping[str, float]) -> _Ask:
    try:
        ranked = await destinations.rank_stores(
            context, client, {"whole": True}, wanted.target, declared_at_once=True, failed_until=failed_until
        )  # fmt: skip
    except errors.BrokerError as error:
        return _Ask(id, wanted, [], [], error)
    best = sorted(ranked.places, key=lambda place: place.store_id in wanted.avoid)  # stable: else as they were ranked
    return _Ask(id, wanted, best, ranked.excluded)


# -- leases


async def _admit(context: Context, client: Client, asks: Sequence[_Ask], at_once: int) -> None:
    """Lease what has to be leased, and record the tickets. Raises `Busy`, `QuotaExceeded`."""
    party = party_of(context, client.principal)
    pending, swept, over_limit = list(asks), False, False
    while pending:
        groups: dict[int, list[_Ask]] = defaultdict(list)
        for ask in pending:
            groups[ask.place.store_id].append(ask)
        grants = await _grant(context, client, party, groups, at_once)
        over_limit = over_limit or any(grant.over_limit for grant in grants)
        refused = [ask for ask in pending if not ask.granted]
        if refused and not swept:  # expired leases count until they are swept
            swept = True
            if await leases.sweep(context.db):
                pending = refused
                continue
        for ask in refused:
            ask.tried[ask.place.store_id] = float(ask.place.estimate["seconds"])
            ask.places.pop(0)
        if any(not ask.places for ask in refused):
            await _turn_away(context, client, party, asks, over_limit=over_limit)
        pending = refused


async def _grant(context: Context, client: Client, party: Party, groups: dict[int, list[_Ask]], at_once: int) -> Sequence[leases.Grant]:
    """Ask once for all: those whose store counts no leases, and of each other store's the last `at_once`; the rest follow these."""
    first: list[tuple[_Ask, leases.GrantRequest]] = []
    for group in groups.values():
        counted = _store(context, group[0].place).write_slots is not None or party.is_limited
        leaders = group if party.is_limited else group[-at_once:]
        first += [(ask, _request(context, client, party, ask, leased=counted)) for ask in (leaders if counted else group)]
    answers = await context.grants([request for _, request in first])
    context.memory.note_leases(answers[0][1])
    open_stores: set[int] = set()
    for (ask, request), (grant, _) in zip(first, answers, strict=True):
        ask.granted = grant.created
        if grant.created and request.wants and not party.is_limited:
            open_stores.add(ask.place.store_id)
    rest = [ask for store_id in open_stores for ask in groups[store_id] if not ask.granted]
    if rest:
        for ask, (grant, _) in zip(rest, await context.grants([_request(context, client, party, ask) for ask in rest]), strict=True):
            ask.granted = grant.created
    return [grant for grant, _ in answers]


def _request(context: Context, client: Client, party: Party, ask: _Ask, *, leased: bool = False) -> leases.GrantRequest:
    """The ticket's row, and the lease where one is needed."""
    principal, target, place, told = client.principal, ask.wanted.target, ask.place, ask.place.estimate
    store = _store(context, place)
    loads = context.memory.write_loads
    recorded = places.Recorded(
        store.id, None, True, max(1, loads[store.name].active if store.name in loads else 1), told["seconds"], told["rate"],
        told["setup_seconds"], told["success"], told["basis"], told["weight"],
    )  # fmt: skip
    row = leases.TicketRow(
        Operation.UPLOAD, principal.project, principal.subject, client.instance, client.address, client.site, target.image_id,
        target.blob_id, target.size, orjson.Fragment(orjson.dumps([list(recorded)])), context.policy.upload_ttl_seconds * upload.MOST_TTLS,
    )  # fmt: skip
    if not leased:
        return leases.GrantRequest(str(ask.id), row, [], False)
    seconds = admit.lease_seconds(float(told["seconds"]), context.policy.admit)
    want = leases.Want(store.id, Direction.WRITE.value, seconds, min(float(told["seconds"]), seconds), ask.size)
    return leases.GrantRequest(str(ask.id), row, [want], True, party)


async def _turn_away(context: Context, client: Client, party: Party, asks: Sequence[_Ask], *, over_limit: bool) -> None:
    """Give back what was leased, and say when to come again. Raises `Busy`, `QuotaExceeded`."""
    held = [(ask.id, None) for ask in asks if ask.granted]
    if held:
        await leases.release(context.db, held)
    if over_limit:
        context.metrics.quota_refusals.inc("upload")
        turn = await promises.until_within_limit(context, party, max(ask.size for ask in asks))
        raise errors.QuotaExceeded("The project may not hold more leases, or leases on so many bytes.", retry_after=turn)
    stores = {id: seconds for ask in asks for id, seconds in ask.tried.items()}
    for id in stores:
        store = context.memory.store_by_id(id)
        if store is not None:
            context.metrics.leases_refused.inc(store.name, Direction.WRITE.value)
    turn = await promises.until_turn(context, f"{client.name} writes", party, stores, Direction.WRITE)
    context.metrics.ticket("upload", errors.Busy.type)
    raise errors.Busy("Every store that can take the upload is at its limit.", retry_after=turn)


# -- signed, then written


async def _sign(context: Context, client: Client, ask: _Ask) -> bool:
    """Sign the URL. False when the store's credential is missing or has ended; then `ask` says so."""
    now, target, place = context.clock(), ask.wanted.target, ask.place
    store = _store(context, place)
    about = {"blob": str(target.blob_id), **target.digests}
    if parts.sealed_where_written(store):
        about |= context.keys.sealer.seal(_record(client, ask.wanted, place.staging_key, now))
    write = Write(
        key=place.staging_key,
        expires_at=min(now + context.policy.url_ttl_seconds, now + context.policy.upload_ttl_seconds),
        size=target.size,
        digests=target.digests,
        metadata=about,
    )
    try:
        handle = context.memory.driver(store.name).sign_put(write, now)
    except errors.BrokerError as error:
        ask.result = error
        return False
    ask.result = Begun(ask.id, handle)
    ask.urls_until = max(write.expires_at, handle.expires_at)
    ask.bound = parts.bound(store, target.digests)
    return True


def _record(client: Client, wanted: Wanted, key: str, now: float) -> Record:
    target, image = wanted.target, wanted.image
    (format,) = image.blobs
    written_for = RecordedImage(image.id, format, image.name, image.project, image.visibility)
    return Record(key, target.blob_id, client.principal.project, target.purpose, target.size, target.digests, written_for, int(now))


class _Full(Exception):
    """These stores have no room for what was to go there."""

    def __init__(self, stores: set[int]) -> None:
        super().__init__()
        self.stores = stores


async def _write(context: Context, client: Client, asks: list[_Ask], take: Take) -> list[_Ask]:
    """Write all of them but for those that somebody else has written, or that there is no room for. Returns those written."""
    while asks:
        try:
            async with transaction(context.db) as connection:
                taken = await take(connection, [ask.wanted for ask in asks])
                begun = [ask for ask, mine in zip(asks, taken, strict=True) if mine]
                await beginnings.images(connection, [ask.wanted.image for ask in begun if ask.wanted.makes_image])
                full = await beginnings.reserve(connection, [(ask.place.store_id, ask.size) for ask in begun])
                if full:
                    raise _Full(full)
                await beginnings.uploads(connection, [_beginning(context, client, ask) for ask in begun])
        except _Full as full:
            for ask in asks:
                if ask.place.store_id in full.stores:
                    excluded = [{"store": _store(context, ask.place).name, "reason": destinations.NO_CAPACITY}]
                    ask.result = errors.NoDestination("The store has no room.", extra={"excluded": excluded})
            asks = [ask for ask in asks if ask.place.store_id not in full.stores]
            continue
        for ask, mine in zip(asks, taken, strict=True):
            if not mine:
                ask.result = errors.Conflict("The same is being uploaded by another request.", retry_after=1.0)
        return begun
    return []


def _beginning(context: Context, client: Client, ask: _Ask) -> Beginning:
    written = upload.row_of(context, client, ask.id, ask.wanted.target, makes_image=ask.wanted.makes_image)
    return Beginning(written, ask.place, ask.urls_until, ask.bound)


def _store(context: Context, place: NewDestination) -> Store:
    """The store of a place that was ranked a moment ago. Raises `StoreUnavailable` when it was removed since."""
    store = context.memory.store_by_id(place.store_id)
    if store is None:
        raise errors.StoreUnavailable("The store was removed.", retry_after=1.0)
    return store
