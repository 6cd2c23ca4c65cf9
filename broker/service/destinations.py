"""Where an upload may go: the ranking of stores to write to, and how one of them is taken.

A place is taken in three steps, each of which can be repeated: its space is reserved, its slot leased, its multipart upload
begun. Whoever finds a place half taken, after a broker died, takes the steps that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from secrets import token_urlsafe
from typing import Any, NamedTuple
from uuid import UUID

from broker import accept, admit, errors, permit, rank
from broker.catalog import deletions, leases, uploads
from broker.catalog.transaction import transaction
from broker.catalog.uploads import Destination, NewDestination, Upload
from broker.model import Client, Direction, Operation, Store, UploadState
from broker.service import asked, parts, promises
from broker.service.context import Context
from broker.service.parties import party_of
from broker.service.targets import Target
from broker.stores.registry import is_handed

HAS_REPLICA = "has-replica"
NO_CAPACITY = "no-capacity"
UNREACHABLE = "unreachable"
FULL = "full"


class Ranked(NamedTuple):
    """The stores to write to, best first, and why the others are not among them, as far as the client may know."""

    places: list[NewDestination]
    excluded: list[dict[str, str]]


async def rank_stores(
    context: Context,
    client: Client,
    request: Mapping[str, Any],
    target: Target,
    *,
    declared_at_once: bool = False,
    failed_until: Mapping[str, float] | None = None,
) -> Ranked:
    """Accept or exclude each store, and put those accepted in the order to try them; with ``whole`` in the request only those that can
    be written in one PUT. `declared_at_once`: the commit will declare no digest that is not in `target`. `failed_until`: what
    `Memory.failures_of` says of the client, where it was asked already.

    Raises `Invalid`, `NoDestination`, `TooLarge`.
    """
    policy, principal = context.policy, client.principal
    needs_digest = not policy.verify.size_suffices
    candidates: list[accept.Candidate] = []
    cuts: dict[str, parts.Cut] = {}
    excluded: list[dict[str, str]] = []
    for store in context.memory.stores().values():
        if is_handed(store.kind) and store.name not in request.get("only", ()):
            context.metrics.exclusion(accept.Reason.NOT_WRITABLE)  # nobody would expect it: there may be one on every host
            continue
        reason = _against(context, store, target, cuts, whole=request.get("whole", False), declared_at_once=declared_at_once)
        if reason is None:
            candidates.append(
                accept.destination(store, store.endpoint.partition(":")[0], context.memory.driver(store.name).limits.max_object)
            )
            continue
        context.metrics.exclusion(reason)
        if permit.may_see_store(principal, store):
            excluded.append({"store": store.name, "reason": reason})
    ask = accept.Request(
        operation=Operation.UPLOAD,
        site=asked.site_of(context, client, request),
        size=target.size,
        project=principal.project,
        sees_private=principal.sees_private_stores,
        prefer=asked.store_names(context, client, request, "prefer"),
        avoid=asked.avoided(context, client, request, (candidate.store for candidate in candidates)),
        schemes=frozenset(request.get("schemes", ())),
        digests=frozenset(target.digests),
        needs_digest=needs_digest,
        failed_until=await context.memory.failures_of(client.name) if failed_until is None else failed_until,
    )
    now = context.clock()
    outlooks = context.memory.outlooks(Direction.WRITE, ask.site, policy.rank, now)
    ranking = rank.rank(ask, candidates, outlooks, context.memory.write_loads, policy.rank, now, context.rng)
    for exclusion in (*ranking.excluded, *ranking.hidden):
        context.metrics.exclusion(exclusion.reason)
    excluded += asked.excluded(ranking.excluded)
    chosen: list[NewDestination] = []
    for candidate, estimate, weight in ranking.sources:
        known = context.memory.store(candidate.store)
        if known is not None:
            chosen.append(_place(known, len(chosen) + 1, target.blob_id, cuts[known.name], estimate, weight))
    if not chosen:
        context.metrics.ticket("upload", "no-destination")
        too_large = bool(excluded) and all(entry["reason"] == parts.TOO_LARGE for entry in excluded)
        error = errors.TooLarge if too_large else errors.NoDestination
        raise error("No store can take this upload.", extra={"excluded": excluded})
    return Ranked(chosen, excluded)


def _against(
    context: Context, store: Store, target: Target, cuts: dict[str, parts.Cut], *, whole: bool, declared_at_once: bool
) -> str | None:
    """What is against a store apart from what `accept` knows; how bytes would be cut for it goes to `cuts`."""
    if store.name in target.taken:
        return HAS_REPLICA
    try:
        limits = context.memory.driver(store.name).limits
    except errors.BrokerError:
        return UNREACHABLE
    if not store.enabled or not store.writable or not store.abilities.writes:
        cuts[store.name] = parts.Cut(None)
        return None  # `accept` says it better
    found = parts.cut(
        target.size,
        store.abilities,
        limits,
        single_put_limit=context.policy.single_put_limit,
        min_part_size=context.policy.min_part_size,
        needs_digest=not context.policy.verify.size_suffices,
        whole=whole,
        only_digests=target.digests if declared_at_once else None,
    )
    if isinstance(found, str):
        return found
    cuts[store.name] = found
    return None


def _place(store: Store, position: int, blob_id: UUID, how: parts.Cut, estimate: rank.Estimate, weight: float) -> NewDestination:
    """A destination's row. Keys are ``<blob>/<unguessable>``: those of the staged and the sealed object share only the blob."""
    shown = {
        "seconds": estimate.seconds,
        "rate": estimate.rate,
        "setup_seconds": estimate.setup_seconds,
        "success": estimate.success,
        "basis": estimate.basis,
        "weight": weight,
    }
    return NewDestination(store.id, position, fresh_key(blob_id), fresh_key(blob_id), how.part_size, shown)


def fresh_key(blob_id: UUID) -> str:
    """A key that nobody can guess and nothing has been written to."""
    return f"{blob_id}/{token_urlsafe(32)}"


async def take(context: Context, client: Client, id: UUID, store: Store) -> tuple[Upload, Destination]:
    """Make the upload's place on `store` active: space, lease, multipart upload.

    Raises `Busy`, `QuotaExceeded`, `NoDestination` (no room), `StoreUnavailable`, `Gone`, `Invalid` (no such place); the place then
    rests again.
    """
    first = await _reserve(context, id, store)
    leased = False
    try:
        upload, place = await _current(context, id, store)
        await lease(context, client, upload, place, store)
        leased = True
        upload, place = await _current(context, id, store, lock=True)  # outside of a transaction: waits for whoever is about to change it
        if place.state != "active":  # the same request, sent twice at once: the other one found no lease a moment ago, and let it rest
            raise await _full(context, client, upload, place, store)
        if place.part_size is not None and place.multipart_id is None:
            await _begin(context, upload, place, store)
            upload, place = await _current(context, id, store)
    except errors.BrokerError as error:
        if (first or leased) and not isinstance(error, errors.Unavailable):
            await _rest(context, id, store, leased)
        raise
    return upload, place


async def _reserve(context: Context, id: UUID, store: Store) -> bool:
    """Take the space of a standby place. True when this call did; False when the place is active already."""
    async with transaction(context.db) as connection:
        upload = open_(await uploads.get(connection, id, lock=True))
        place = upload.destination(store.id)
        if place is None or place.state == "dropped":
            raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's destinations")
        if place.state == "active":
            return False
        if not await uploads.activate(connection, upload, store.id):
            raise errors.NoDestination("The store has no room.", extra={"excluded": [{"store": store.name, "reason": NO_CAPACITY}]})
    return True


async def _rest(context: Context, id: UUID, store: Store, leased: bool) -> None:
    """Let go of a place that could not be taken as a whole. `leased` is whether a lease was got for it; if not, but there is one, then
    the same request was sent twice at once, and the other one has it."""
    async with transaction(context.db) as connection:
        upload = await uploads.get(connection, id, lock=True)
        if upload is None or upload.state is not UploadState.OPEN:
            return
        if not leased and any(lease.store_id == store.id for lease in await leases.held(connection, id)):
            return
        await uploads.rest(connection, upload, store.id, fresh_key(upload.blob_id))
    if leased:
        await leases.release(context.db, [(id, store.id)])


async def lease(context: Context, client: Client, upload: Upload, place: Destination, store: Store) -> None:
    """Renew the upload's lease on `store`, or get one; expired ones are swept before it is refused. Stores without slots need none,
    unless the project's leases are counted. Raises `Busy`, `QuotaExceeded`."""
    party = party_of(context, client.principal)
    if store.write_slots is None and not party.is_limited:
        return
    policy, own_seconds, bytes = context.policy.admit, float(place.estimate["seconds"]), upload.size or 0
    seconds = admit.lease_seconds(own_seconds, policy)
    want = leases.Want(store.id, Direction.WRITE.value, seconds, min(own_seconds, seconds), bytes)
    over_limit = False
    for attempt in range(2):
        if await leases.renew(context.db, upload.id, store.id, seconds, policy.max_total_seconds) is not None:
            return
        if attempt:
            await leases.sweep(context.db)
        ((grant, held),) = await context.grants([leases.GrantRequest(str(upload.id), None, [want], False, party)])
        context.memory.note_leases(held)
        if grant.leases:
            context.promises.kept(context, _who(client))
            return
        over_limit = grant.over_limit
    if not over_limit:
        context.metrics.leases_refused.inc(store.name, Direction.WRITE.value)
        raise await _full(context, client, upload, place, store)
    context.metrics.quota_refusals.inc("upload")
    turn = await promises.until_within_limit(context, party, bytes)
    refusal = errors.QuotaExceeded("The project may not hold more leases, or leases on so many bytes.", retry_after=turn)
    refusal.stores, refusal.bytes = {store.id: own_seconds}, bytes
    raise refusal


async def _full(context: Context, client: Client, upload: Upload, place: Destination, store: Store) -> errors.Busy:
    stores, party = {store.id: float(place.estimate["seconds"])}, party_of(context, client.principal)
    returned = context.promises.has_returned(_who(client), context.clock())
    turn = await promises.until_turn(context, _who(client), party, stores, Direction.WRITE)
    refusal = errors.Busy("The store is at its limit.", retry_after=turn, extra={"excluded": [{"store": store.name, "reason": FULL}]})
    refusal.stores, refusal.bytes, refusal.who, refusal.returned = stores, upload.size or 0, _who(client), returned
    return refusal


def _who(client: Client) -> str:
    """Names whoever asks for a place to write to, to know it again when it comes back."""
    return f"{client.name} writes"


async def _begin(context: Context, upload: Upload, place: Destination, store: Store) -> None:
    """Begin the multipart upload. When two brokers do at once, one of theirs counts and the other is aborted."""
    assert place.part_size is not None
    driver = context.memory.driver(store.name)
    about = await parts.metadata(context, upload, place.staging_key, upload.digests, upload.size)
    fresh = await driver.begin(place.staging_key, upload.size, place.part_size, about)
    kept = await uploads.begun(context.db, upload.id, store.id, fresh)
    if kept != fresh:
        await deletions.schedule(context.db, store.id, place.staging_key, multipart_id=fresh, reason="begun twice")


async def _current(context: Context, id: UUID, store: Store, *, lock: bool = False) -> tuple[Upload, Destination]:
    upload = open_(await uploads.get(context.db, id, lock=lock))
    place = upload.destination(store.id)
    if place is None:
        raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's destinations")
    return upload, place


def open_(upload: Upload | None) -> Upload:
    """The upload if it can still be written to. Raises `NotFound`, `Gone`, `Conflict`."""
    if upload is None:
        raise errors.NotFound("No such ticket.")
    if upload.state is UploadState.COMMITTING:
        raise errors.Conflict("The upload is being committed.", retry_after=1.0)
    if upload.state is not UploadState.OPEN or upload.expired:
        raise errors.Gone(f"The upload has ended ({ended(upload)}); ask for a new one.")
    return upload


def ended(upload: Upload) -> str:
    """How it ended, in a word or a sentence."""
    return upload.problem or ("expired" if upload.state is UploadState.OPEN else upload.state.value)
