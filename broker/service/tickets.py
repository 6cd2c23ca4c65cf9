"""What can be done with a ticket once it is given: look at it, refresh it, use a standby place, give it back.

A ticket belongs to the principal that asked for it; to everyone else it does not exist. Any broker can serve any ticket.
It opens nothing that a new one would not: what may be read, and from where, is asked again each time (invariant 2).
Uploads go their own way (`broker.service.upload`) where a destination differs from a source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import orjson

from broker import accept, admit, errors
from broker.catalog import leases
from broker.catalog import tickets as records
from broker.catalog.compact import CompactBlob
from broker.catalog.leases import Party
from broker.catalog.tickets import TicketRecord
from broker.model import Client, Direction, Operation, client_name
from broker.paths import IDLE
from broker.permit import may_read_blob
from broker.service import asked, explain, places, promises, upload, ways
from broker.service.context import Context
from broker.service.instants import instant
from broker.service.parties import party_of
from broker.service.places import Recorded


async def find(context: Context, client: Client, id: UUID) -> TicketRecord:
    """The client's own ticket. Raises `NotFound`."""
    if id in context.unrecorded:
        raise errors.NotFound("This ticket was stale and is not recorded; ask for another one.")
    record = await records.get(context.db, id)
    principal = client.principal
    if record is None or (record.project, record.subject) != (principal.project, principal.subject):
        raise errors.NotFound("No such ticket.")
    return record


async def get_ticket(context: Context, client: Client, id: UUID) -> dict[str, Any]:
    """The ticket as it stands: state and leases, and for an upload the parts that have arrived. Raises `NotFound`."""
    record = await find(context, client, id)
    if record.operation is Operation.UPLOAD:
        return await upload.upload_state(context, client, record.id) | {"why": explain.why(context, client, record)}
    blob = await context.memory.blob(record.blob_id)
    if blob is None:
        raise errors.NotFound("No such ticket.")
    held = {lease.store_id: lease for lease in await leases.held(context.db, id)}
    shown_places = []
    for place in places.recorded(record.places):
        store = context.memory.store_by_id(place.store_id)
        if store is None:
            continue
        active = place.store_id in held or (place.active and store.read_slots is None)
        shown: dict[str, Any] = {"store": store.name, "state": "active" if active else "standby"}
        if place.store_id in held:
            shown["lease_expires_at"] = instant(held[place.store_id].expires_at)
        shown_places.append(shown)
    answer = {
        "id": str(id),
        "operation": "download",
        "state": "expired" if record.state == "open" and record.expired else record.state,
        "blob": orjson.Fragment(blob.summary),
        "expires_at": instant(record.expires_at),
        "places": shown_places,
        "why": explain.why(context, client, record),
    }
    if record.image_id is not None:
        answer["image"] = str(record.image_id)
    return answer


async def release_ticket(context: Context, client: Client, id: UUID) -> None:
    """Give the leases back; an upload is abandoned. Doing it twice is no error. Raises `NotFound`."""
    record = await find(context, client, id)
    if record.operation is Operation.UPLOAD:
        await upload.release_upload(context, client, id)
        return
    context.repeats.settled(client_name(record.project, record.subject, record.instance, record.address), record.blob_id)
    await records.release(context.db, id)
    await leases.release(context.db, [(id, None)])


async def show_again(context: Context, client: Client, id: UUID) -> dict[str, Any] | None:
    """The ticket of a retried request, signed anew with the leases it has; ``None`` when it was never written."""
    record = await records.get(context.db, id)
    if record is None:
        return None
    if record.operation is Operation.UPLOAD:
        return await upload.refresh_upload(context, client, id)
    return await _render(context, client, record)


async def refresh_ticket(context: Context, client: Client, id: UUID) -> dict[str, Any]:
    """New URLs for the same places, leases renewed, the ticket's end moved.

    Raises `NotFound`, `Gone`, `Busy`, `QuotaExceeded`, `NoSource`.
    """
    record = _open(await find(context, client, id))
    if record.operation is Operation.UPLOAD:
        return await upload.refresh_upload(context, client, id)
    blob = await _readable(context, client, record)
    found = places.recorded(record.places)
    if not await _hold_places(context, client, record, blob, found):
        stores = {place.store_id: place.seconds for place in found}
        raise await _refusal(context, client, record, stores, "The leases have ended and every store is at its limit.")
    slowest = [admit.Offer("", None, place.seconds) for place in found]
    await records.extend(context.db, id, admit.ticket_seconds(slowest, context.policy.admit))
    return await _render(context, client, await find(context, client, id))


async def _hold_places(context: Context, client: Client, record: TicketRecord, blob: CompactBlob, found: Sequence[Recorded]) -> bool:
    """Renew the leases of the active places, or get new ones; with none of them left, the best standby place becomes active.

    False when there are places to offer, and all of them are full.
    """
    offered = []
    for index, place in enumerate(found):
        candidate, reason = _still_offered(context, client, blob, place, context.clock())
        if candidate is not None and reason is None:
            offered.append((index, place, candidate.slots))
    party = party_of(context, client.principal)
    held = not offered  # then there is nothing to wait for
    for index, place, slots in sorted(offered, key=lambda entry: not entry[1].active):
        if held and not place.active:
            break
        if (slots is None and not party.is_limited) or await _hold(context, party, record, place):
            held = True
            if not place.active:
                await _set_active(context, record.id, found, index)
    return held


async def _hold(context: Context, party: Party, record: TicketRecord, place: Recorded) -> bool:
    """Renew the lease on the place, or get one. False when its store is full."""
    policy = context.policy.admit
    seconds = admit.lease_seconds(place.seconds, policy)
    if await leases.renew(context.db, record.id, place.store_id, seconds, policy.max_total_seconds) is not None:
        return True
    return await _grant_or_sweep(context, party, record, place)


async def _set_active(context: Context, id: UUID, found: Sequence[Recorded], index: int) -> None:
    await records.set_places(context.db, id, [list(place._replace(active=place.active or i == index)) for i, place in enumerate(found)])


async def activate_place(context: Context, client: Client, id: UUID, request: Mapping[str, Any]) -> dict[str, Any]:
    """Lease a standby place. Raises `NotFound`, `Gone`, `Invalid` (no such place), `NoSource` (not any more), `Busy`, `QuotaExceeded`."""
    record = _open(await find(context, client, id))
    if record.operation is Operation.UPLOAD:
        return await upload.activate_destination(context, client, id, request)
    found = places.recorded(record.places)
    store = context.memory.store(request["store"])
    index = next((i for i, place in enumerate(found) if store is not None and place.store_id == store.id), None)
    candidate, reason = None, None
    if store is not None and index is not None:
        blob = await _readable(context, client, record)
        candidate, reason = _still_offered(context, client, blob, found[index], context.clock())
    if store is None or index is None or candidate is None:
        raise errors.Invalid("The ticket names no such store.", field="store", expected="a store of the ticket's sources")
    if reason is not None:
        raise errors.NoSource("This place can be offered no more.", extra={"excluded": [{"store": store.name, "reason": reason}]})
    party = party_of(context, client.principal)
    if store.read_slots is not None or party.is_limited:
        held = {lease.store_id for lease in await leases.held(context.db, id)}
        if store.id not in held and not await _grant_or_sweep(context, party, record, found[index]):
            raise await _refusal(context, client, record, {store.id: found[index].seconds}, "The store is at its limit.")
    if not found[index].active:
        await _set_active(context, id, found, index)
    return await _render(context, client, await find(context, client, id))


async def _grant_or_sweep(context: Context, party: Party, record: TicketRecord, place: Recorded) -> bool:
    """Ask for a lease for an existing ticket, once more after expired ones were swept. Whether it was granted. Raises `QuotaExceeded`."""
    seconds = admit.lease_seconds(place.seconds, context.policy.admit)
    want = leases.Want(place.store_id, "read", seconds, min(place.seconds, seconds), record.size or 0)
    over_limit = False
    for _ in range(2):
        ((grant, held),) = await context.grants([leases.GrantRequest(str(record.id), None, [want], False, party)])
        context.memory.note_leases(held)
        if grant.leases:
            return True
        over_limit = grant.over_limit
        await leases.sweep(context.db)
    if over_limit:
        context.metrics.quota_refusals.inc("download")
        turn = await promises.until_within_limit(context, party, want.bytes)
        raise errors.QuotaExceeded("The project may not hold more leases, or leases on so many bytes.", retry_after=turn)
    return False


async def _refusal(context: Context, client: Client, record: TicketRecord, stores: dict[int, float], detail: str) -> errors.Busy:
    party = party_of(context, client.principal)
    turn = await promises.until_turn(context, f"{client.name} {record.blob_id}", party, stores, Direction.READ)
    return errors.Busy(detail, retry_after=turn)


def _open(record: TicketRecord) -> TicketRecord:
    if record.state != "open" or (record.expired and record.operation is Operation.DOWNLOAD):
        raise errors.Gone("The ticket has ended; ask for a new one.")
    return record


async def _render(context: Context, client: Client, record: TicketRecord) -> dict[str, Any]:
    """A download ticket with fresh URLs for those of its places that may still be offered. Raises `NoSource`."""
    blob = await _readable(context, client, record)
    now = context.clock()
    held = {lease.store_id for lease in await leases.held(context.db, record.id)}
    out: list[dict[str, str]] = []
    active: list[places.Place] = []
    standby: list[places.Place] = []
    for recorded in places.recorded(record.places):
        candidate, reason = _still_offered(context, client, blob, recorded, now)
        if candidate is None:
            continue
        if reason is not None:
            out.append({"store": candidate.store, "reason": reason})
            continue
        is_active = recorded.store_id in held or (recorded.active and candidate.slots is None)
        (active if is_active else standby).append(recorded.place(candidate, "active" if is_active else "standby"))
    sources: list[orjson.Fragment] = []
    until = places.until(context, record.expires_at, now)
    filename = None if record.why is None else record.why.get("filename")
    for place in (*active, *standby):
        read = places.sign_read(context, place.store, place.key, until, filename)
        if read is None:
            out.append({"store": place.store, "reason": accept.Reason.UNSIGNABLE})
        else:
            sources.append(places.show_read(place, len(sources) + 1, read))
    if not sources:
        raise errors.NoSource("None of the ticket's places can be offered any more.", extra={"excluded": out})
    format = next((image.format for image in blob.images if image.id == record.image_id), None)
    ticket = asked.render_download(record.id, record.state, blob.summary, record.image_id, format, record.expires_at, sources, out)
    chosen = (record.why or {}).get("formats")
    return ticket if chosen is None else ticket | {"conversion": asked.conversion(format, chosen)}


async def _readable(context: Context, client: Client, record: TicketRecord) -> CompactBlob:
    """The ticket's blob, if this principal may read it still. Raises `NotFound`, as a new ticket for it would."""
    blob = await context.memory.blob(record.blob_id)
    if blob is None or not may_read_blob(client.principal, blob.images):
        raise errors.NotFound("No such blob.")
    return blob


def _still_offered(
    context: Context, client: Client, blob: CompactBlob, recorded: Recorded, now: float
) -> tuple[accept.Candidate | None, accept.Reason | None]:
    """The candidate behind a recorded place, and what is against it now; no candidate when it must not be shown."""
    candidate = next((c for c in ways.candidates(context, blob) if c.replica == recorded.replica), None)
    if candidate is None:
        return None, None
    principal = client.principal
    request = accept.Request(
        Operation.DOWNLOAD, project=principal.project, sees_private=principal.sees_private_stores,
        schemes=frozenset((candidate.scheme,)), proven_site=client.site,
    )  # fmt: skip
    reason = accept.accept(request, candidate, IDLE, now)
    if reason is accept.Reason.PRIVATE:
        return None, None
    return candidate, None if reason is accept.Reason.FULL else reason
